// One quantity among the small multiples.

import { Chart } from "../charts/chart.js";
import { h } from "../charts/dom.js";
import { number, shortName, signed } from "../data/format.js";

/** The last value of a single run, and its residual; marked where it is outside two standard deviations, or 90 %. */
function latest(panel) {
  const { measured, orders, layers, others } = panel.runs[0].quantity;
  const shown = measured.length ? { points: measured } : (orders.at(-1) ?? layers.at(-1) ?? others.at(-1));
  const name = shown.series ? `${shortName(shown.series)}: ` : "";
  const last = panel.residual?.lines.at(-1)?.points.at(-1)?.[1];
  const share = panel.residual?.kind === "quantile";
  const outside = share ? Math.abs(last - 0.5) > 0.45 : panel.residual?.kind === "z" && Math.abs(last) > 2;
  const text = (value) => (share ? number(value, 2) : signed(value, 2));
  // A difference from zero is the value itself.
  const beside = last !== undefined && panel.residual.kind !== "difference" && `${panel.residual.short} ${text(last)}${outside ? " ▲" : ""}`;
  return h(
    "span",
    { class: "latest" },
    name + number(shown.points.at(-1)?.[1]),
    h("span", { class: outside ? "beside outside" : "beside" }, beside),
  );
}

/** "0: the NTK is frozen" is short for the card; the rest is in the enlarged view. */
function limit(about) {
  const value = (about.at_infinite_width ?? "").match(/^[\d.]+(?=:|,|$)/)?.[0];
  return value && h("span", { class: "limit", title: `at infinite width: ${about.at_infinite_width}` }, `n → ∞: ${value}`);
}

export class Card {
  /** enlarge() is called when the title is pressed; onStep as in Chart. */
  constructor(name, enlarge, onStep) {
    this.title = h("button", { class: "title", click: enlarge });
    this.sub = h("div", { class: "sub" });
    this.chart = new Chart(name, onStep);
    this.host = h("div", { class: "host" }, this.chart.element);
    this.element = h("section", { class: "card", "data-quantity": name }, this.title, this.sub, this.host);
  }

  /** The words; single: one run is chosen. */
  describe(panel, about, single) {
    this.title.setAttribute("title", `${about.formula ?? about.title}: enlarge`);
    this.title.replaceChildren(h("span", {}, about.title));
    this.sub.replaceChildren(...[single && latest(panel), limit(about)].filter(Boolean));
  }

  /** The chart, `height` high without its steps. */
  draw(panel, look, height) {
    const residual = panel.residual ? Math.round(Math.max(38, height * 0.27)) : 0;
    const main = height - residual - (residual ? 10 : 0);
    this.chart.draw(panel, { ...look, width: this.host.clientWidth, main, residual, font: 11 });
  }
}
