// One quantity, large, with its formula, unit and source.

import { mountChart } from "./chart.js";
import { h } from "./dom.js";
import { eventList, swatch } from "./runs.js";
import { exportButtons, legendOf } from "./toolbar.js";

/** A dialog that closes by Esc, its button, or a click beside it. */
export function openDialog(...children) {
  const close = () => dialog.close();
  const body = h("div", { class: "body" }, children);
  const dialog = h("dialog", {}, h("button", { class: "close", "aria-label": "close", click: close }, "×"), body);
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, body };
}

/** What is known of a quantity besides its numbers. */
function explanation(about) {
  const rows = [
    ["formula", about.formula],
    ["unit", about.unit],
    ["source", about.source],
    ["at infinite width", about.at_infinite_width],
  ].filter(([, text]) => text);
  return h("dl", {}, rows.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]));
}

/**
 * @param {string} first the quantity to begin with
 * @param {{names, panel, about, look, single, exports}} view names: all quantities; panel(name, more options),
 *   about(name), look() and exports(name) as of now; single: one run is chosen
 * @returns {{redraw()}} for when data or settings change
 */
export function openDetail(first, view) {
  let name = first;
  const { dialog, body } = openDialog();
  dialog.classList.add("detail");

  function go(next) {
    name = next;
    redraw();
  }

  function redraw() {
    const names = view.names();
    if (!names.includes(name) || !dialog.isConnected) return;
    const panel = view.panel(name, { layers: true });
    const about = view.about(name);
    const single = view.single();
    const at = names.indexOf(name);
    const select = h(
      "select",
      { name: "quantity", change: () => go(select.value) },
      names.map((other) => h("option", { value: other, selected: other === name }, view.about(other).title)),
    );
    const step = (by, sign, label) =>
      h("button", { "aria-label": label, click: () => go(names[(at + by + names.length) % names.length]) }, sign);
    const host = h("div", { class: "host" });
    body.replaceChildren(
      h("div", { class: "bar" }, step(-1, "‹", "previous"), select, step(1, "›", "next"), exportButtons(view.exports(name))),
      legendOf([panel], single, view.look().theme),
      single ? "" : h("div", { class: "legend" }, panel.runs.map((run) => h("span", {}, swatch(run), run.name))),
      host,
      explanation(about),
      eventList(panel.events.map(({ step: s, run, text }) => ({ step: s, run: single ? "" : run, text }))) ?? "",
    );
    const width = host.clientWidth || 900;
    const height = Math.max(200, window.innerHeight * 0.9 - (single ? 340 : 370));
    const residual = panel.residual ? Math.round(height * 0.28) : 0;
    const look = { ...view.look(), width, main: height - residual, residual, font: 13, stepLabel: true };
    mountChart(host, panel, look, () => {});
  }

  redraw();
  return { redraw };
}
