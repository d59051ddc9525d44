// What a run says about itself, and the line that stands for it in the charts.

import { h, svg } from "../charts/dom.js";
import { number } from "../data/format.js";
import { badge } from "../first/badges.js";
import { markdown } from "./markdown.js";

/** The small line that stands for a run in the charts. */
export function swatch(style) {
  return svg(
    "svg",
    { width: 26, height: 12, class: "swatch", "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 25, y1: 6, y2: 6, stroke: style.color, "stroke-width": 3 }),
  );
}

function known(value) {
  return value !== null && value !== undefined;
}

function facts(info) {
  const rows = [
    ["network", info.network],
    ["depth L, width n", known(info.depth) && `${number(info.depth)}, ${number(info.width)}`],
    ["r = L/n", known(info.r) && number(info.r)],
    ["ε = Var G / E[G]²", known(info.epsilon) && number(info.epsilon)],
    ["regime of r", info.regime],
    ["criticality", info.criticality],
    ["parameters", info.parameters?.toLocaleString("en")],
    ["probe", known(info.probe) && `${info.probe[0]} inputs, ${info.probe[1]} outputs`],
    ["optimizer", info.optimizer],
  ];
  return rows.filter(([, value]) => value);
}

/** Where each forecast holds, with all its reasons. */
function forecasts({ claims, validity, level }) {
  const known = claims?.length ? claims : validity ? [{ level, ...validity }] : [];
  return h("ul", { class: "claims" }, known.map((claim) => h("li", {}, `${claim.level}, ${claim.flag}: ${claim.reason}`)));
}

/** All that a run says about itself. */
export function runDetails(run, pages = {}) {
  const info = run.info ?? {};
  const skipped = info.skipped ?? [];
  return h(
    "div",
    { class: "details" },
    h("h2", {}, run.name),
    h("p", {}, badge(run.summary.regime), " ", run.summary.regime.reason),
    h("p", {}, badge(run.summary.theory, "theory"), " ", run.problem || run.summary.theory.reason),
    forecasts(info),
    h("dl", {}, facts(info).map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
    eventList(info.events ?? []),
    skipped.length > 0 &&
      h("div", {}, h("h3", {}, "Skipped measurements"), h("ul", {}, skipped.map((s) => h("li", {}, `step ${s.step}: ${s.reason}`)))),
    info.diagnosis ? markdown(info.diagnosis) : null,
    Object.entries(pages).map(([name, text]) => h("section", {}, h("h3", {}, name.replaceAll("_", " ")), markdown(text))),
  );
}

/** Events as a list; nothing for none. */
export function eventList(events) {
  if (events.length === 0) return null;
  const line = ({ step, run, quantity, text }) => {
    const where = [run, quantity].filter(Boolean).join(", ");
    return h("li", {}, h("b", {}, `step ${step}`), where ? ` ${where}: ` : ": ", text);
  };
  const ordered = [...events].sort((a, b) => a.step - b.step);
  return h("div", { class: "events" }, h("h3", {}, "Events"), h("ul", {}, ordered.map(line)));
}
