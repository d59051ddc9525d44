// One quantity, large, with its formula, unit and source.

import { Chart } from "../charts/chart.js";
import { h } from "../charts/dom.js";
import { eventList, swatch } from "./runs.js";
import { exportButtons, legendOf } from "./toolbar.js";

/** A dialog that closes by Esc, its button, or a click beside it. */
export function openDialog(...children) {
  const close = () => dialog.close();
  const dialog = h("dialog", {}, h("button", { class: "close", "aria-label": "close", click: close }, "×"), children);
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
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

/** The enlarged view of one quantity at a time. */
export class Detail {
  /**
   * @param {string} first the quantity to begin with
   * @param {{names(), panel(name, more), about(name), look(), single(), exports(name)}} view what there is, as of now
   */
  constructor(first, view) {
    this.view = view;
    this.name = first;
    this.listed = "";
    this.select = h("select", { name: "quantity", change: () => this.go(this.select.value) });
    const step = (by, sign, label) => h("button", { "aria-label": label, click: () => this.#step(by) }, sign);
    const bar = [step(-1, "‹", "previous"), this.select, step(1, "›", "next"), exportButtons(() => view.exports(this.name))];
    this.chart = new Chart("enlarged", () => {});
    this.head = h("div", {});
    this.foot = h("div", {});
    this.dialog = openDialog(h("div", { class: "bar" }, bar), this.head, this.chart.element, this.foot);
    this.dialog.classList.add("detail");
    this.redraw();
  }

  go(name) {
    this.name = name;
    this.redraw();
  }

  #step(by) {
    const names = this.view.names();
    this.go(names[(names.indexOf(this.name) + by + names.length) % names.length]);
  }

  /** Show the data and settings as of now. */
  redraw() {
    const { view, name } = this;
    const names = view.names();
    if (!this.dialog.isConnected || !names.includes(name)) return;
    this.#list(names);
    const [panel, look, single] = [view.panel(name, { layers: true }), view.look(), view.single()];
    const runs = h("div", { class: "legend" }, panel.runs.map((run) => h("span", {}, swatch(run), run.name)));
    this.head.replaceChildren(legendOf([panel], single, look.theme), single ? "" : runs);
    const events = panel.events.map(({ step, run, text }) => ({ step, run: single ? "" : run, text }));
    this.foot.replaceChildren(explanation(view.about(name)), eventList(events) ?? "");
    const height = Math.max(200, window.innerHeight * 0.9 - (single ? 340 : 370));
    const residual = panel.residual ? Math.round(height * 0.28) : 0;
    const width = this.head.clientWidth || 900;
    this.chart.draw(panel, { ...look, width, main: height - residual, residual, font: 13, stepLabel: true });
  }

  /** The list of quantities, left alone while it is the same: it may be open. */
  #list(names) {
    const listed = JSON.stringify(names.map((name) => this.view.about(name).title));
    if (listed !== this.listed) {
      this.select.replaceChildren(...names.map((name) => h("option", { value: name }, this.view.about(name).title)));
    }
    this.listed = listed;
    this.select.value = this.name;
  }
}
