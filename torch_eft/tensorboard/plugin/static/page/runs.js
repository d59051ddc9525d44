// The list of runs: choose, and see at a glance r, regime and whether the theory is valid.

import { h, svg } from "../charts/dom.js";
import { number } from "../data/format.js";
import { markdown } from "./markdown.js";

const FLAGS = {
  valid: ["●", "valid"],
  caution: ["▲", "caution"],
  invalid: ["■", "invalid"],
};

/** Whether the theory is valid; the reason when pointed at. A run that nothing is predicted for is measured, not invalid. */
export function flagBadge(info) {
  const none = info?.level === "measurements only" && info.validity?.flag === "invalid";
  const flag = none ? "measured only" : info?.validity?.flag;
  const [shape, word] = FLAGS[flag] ?? ["○", flag ?? "unknown"];
  return h("span", { class: `badge flag ${FLAGS[flag] ? flag : "unknown"}`, title: info?.validity?.reason ?? "" }, `${shape} ${word}`);
}

function shapeBadges(info) {
  if (!info) return [];
  const badges = [];
  if (known(info.r)) {
    const title = `r = L/n: depth ${number(info.depth)} over width ${number(info.width)}`;
    badges.push(h("span", { class: "badge r", title }, `r = ${number(info.r, 3)}`));
  }
  // "0 < r << 1: effectively deep, ..." is short for the badge; the rest is in the details.
  if (info.regime) badges.push(h("span", { class: "badge", title: info.regime }, info.regime.split(":")[0]));
  return badges;
}

/** The small line that stands for a run in the charts. */
export function swatch(style) {
  return svg(
    "svg",
    { width: 26, height: 12, class: "swatch", "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 25, y1: 6, y2: 6, stroke: style.color, "stroke-width": 3 }),
  );
}

/** Choose this run alone; or, where it is alone, the newest ones again. */
function onlyButton(name, styles, only) {
  const alone = styles.size === 1 && styles.has(name);
  return h("button", { class: "link", "data-action": "only", click: () => only(alone ? null : name) }, alone ? "several" : "only");
}

/**
 * One row a run.
 * @param {{name, info, problem}[]} runs
 * @param {Map<string, {color}>} styles of the chosen runs
 * @param {{toggle(name), only(name), details(run)}} actions; only(null) goes back to several
 */
export function runList(runs, styles, actions) {
  return h(
    "ul",
    { class: "runs" },
    runs.map((run) => {
      const style = styles.get(run.name);
      const sentence = run.problem || run.info?.validity?.reason || "";
      const box = h("input", { type: "checkbox", change: () => actions.toggle(run.name) });
      box.checked = Boolean(style);
      return h(
        "li",
        {},
        h("label", { class: "choose", title: run.name }, box, swatch(style ?? { color: "transparent" }), h("span", { class: "name" }, run.name)),
        flagBadge(run.info),
        h("span", { class: "badges" }, shapeBadges(run.info)),
        h("span", { class: "reason", title: sentence }, sentence),
        h(
          "span",
          {},
          runs.length > 1 && onlyButton(run.name, styles, actions.only),
          h("button", { class: "link", "data-action": "details", click: () => actions.details(run) }, "details"),
        ),
      );
    }),
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
    ["regime", info.regime],
    ["criticality", info.criticality],
    ["parameters", info.parameters?.toLocaleString("en")],
    ["probe", known(info.probe) && `${info.probe[0]} inputs, ${info.probe[1]} outputs`],
    ["optimizer", info.optimizer],
    ["level of theory", info.level],
  ];
  return rows.filter(([, value]) => value);
}

/** All that a run says about itself. */
export function runDetails(run, pages = {}) {
  const info = run.info ?? {};
  const skipped = info.skipped ?? [];
  return h(
    "div",
    { class: "details" },
    h("h3", {}, run.name),
    h("p", {}, flagBadge(run.info), " ", run.problem || info.validity?.reason || ""),
    h("dl", {}, facts(info).map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
    eventList(info.events ?? []),
    skipped.length > 0 &&
      h("div", {}, h("h4", {}, "Skipped measurements"), h("ul", {}, skipped.map((s) => h("li", {}, `step ${s.step}: ${s.reason}`)))),
    info.diagnosis ? markdown(info.diagnosis) : null,
    Object.entries(pages).map(([name, text]) => h("section", {}, h("h4", {}, name.replaceAll("_", " ")), markdown(text))),
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
  return h("div", { class: "events" }, h("h4", {}, "Events"), h("ul", {}, ordered.map(line)));
}
