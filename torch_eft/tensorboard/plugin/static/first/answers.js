// Of one run, the four questions that a reader comes with, answered.

import { h } from "../charts/dom.js";
import { amount, number } from "../data/format.js";
import { depthWidthMap } from "./depth_width.js";
import { kernelScale, scaleKey } from "./kernel_scale.js";

const MAP_HEIGHT = 168;

function card(title, key, ...children) {
  return h("article", { class: "answer", "data-answer": key }, h("h2", {}, title), children);
}

/** How far from the kernel regime? */
function kernel({ summary, info }, regimes, width, theme) {
  const { drift, features, distance, regime } = summary;
  const changes = { drift: drift.measured, features };
  const range = ([low, high]) => `${amount(low)} .. ${amount(high)}`;
  const expected = summary.ending.state === "running" && info?.expected_drift;
  const predicted = (expected && `expected at the end ${range(expected)}`) || (drift.low !== null && `predicted ${range([drift.low, drift.high])}`);
  const big = drift.measured !== null ? `NTK moved ${amount(drift.measured)}` : features !== null ? `features moved ${amount(features)}` : "not measured";
  const beside = [
    predicted,
    drift.measured !== null && features !== null && `features moved ${amount(features)}`,
    distance !== null && !predicted && `1 − cos(H, H₀) = ${number(distance, 2)}`,
  ];
  const scale = kernelScale(width, changes, drift, regimes, theme);
  return card(
    "How far from the kernel regime?",
    "kernel",
    h("p", { class: "big" }, big),
    scale,
    scale && scaleKey(theme, changes),
    h("p", {}, beside.filter(Boolean).join("; ")),
    h("p", { class: "soft" }, `${regime.name}: ${regime.meaning || regime.reason}`),
  );
}

/** How far from theory? */
function theory({ summary }) {
  const { compared, theory: reach } = summary;
  const rows = compared.rows.map(([name, value, words]) => h("tr", { title: words }, h("th", { scope: "row" }, name), h("td", {}, value)));
  return card(
    "How far from theory?",
    "theory",
    h("p", { class: `big state-${compared.state}` }, compared.words),
    rows.length > 0 && h("table", { class: "distances" }, h("tbody", {}, rows)),
    compared.left && h("p", {}, compared.left),
    compared.words !== reach.reason && h("p", { class: "soft" }, `theory ${reach.name}: ${reach.reason}`),
  );
}

/** Depth or width? */
function shape(run, runs, edges, width, theme) {
  const { info, summary } = run;
  const map = depthWidthMap(width, MAP_HEIGHT, runs, new Map([[run.name, { color: theme.measured }]]), edges, theme);
  const words = () => {
    const epsilon = info.epsilon > info.r ? `, ε = ${number(info.epsilon, 2)}` : "";
    return `r = ${number(info.r, 2)}${epsilon}; small below ${number(summary.size.edge, 2)}; from ${number(summary.size.too_deep, 2)} on 1/n is no expansion`;
  };
  return card(
    "Depth or width?",
    "shape",
    map ?? h("p", { class: "big" }, "not known"),
    h("p", { class: map ? "" : "soft" }, summary.size ? words() : "The map is for multilayer perceptrons; this network has no one depth and width. Before training, eft.diagnose says what it can of r and of the spread over seeds."),
  );
}

/** What to do? */
function todo({ summary, info }) {
  const lines = summary.advice.length ? summary.advice : ["Nothing is wrong."];
  const left = info?.left_out ?? [];
  return card(
    "What to do?",
    "advice",
    h("ul", {}, lines.map((line) => h("li", {}, line))),
    left.length > 0 && h("p", { class: "soft" }, `left out: ${left.join("; ")}`),
  );
}

/**
 * @param {{name, info, summary}} run
 * @param {object[]} runs all of them, for the map
 * @param {{regimes, edges}} bounds
 * @param {number} width of one card's inside, in pixels
 */
export function answers(run, runs, bounds, width, theme) {
  return [kernel(run, bounds.regimes, width, theme), theory(run), shape(run, runs, bounds.edges, width, theme), todo(run)];
}
