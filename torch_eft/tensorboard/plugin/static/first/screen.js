// What is above the charts: the run, or the table of runs, and the answers.

import { h } from "../charts/dom.js";
import { answers } from "./answers.js";
import { severalAnswers } from "./several.js";
import { RunTable, runRow } from "./table.js";

const NARROWEST = 250;
// Padding and border of a card, and the gap between two.
const [FRAME, GAP] = [26, 8];

export class FirstScreen {
  /** actions as in RunTable */
  constructor(actions) {
    this.actions = actions;
    this.table = new RunTable(actions);
    this.runs = h("div", { class: "which" });
    this.answers = h("div", { class: "answers" });
    this.element = h("div", { class: "first-screen" }, this.runs, this.answers);
  }

  /**
   * @param {{runs, bounds}} listing
   * @param {Map<string, {color}>} styles of the chosen runs
   */
  draw(listing, styles, settings, theme) {
    const { runs, bounds } = listing;
    if (runs.length === 1) this.runs.replaceChildren(runRow(runs[0], this.actions));
    else {
      if (!this.table.element.isConnected) this.runs.replaceChildren(this.table.element);
      this.table.draw(runs, styles, settings);
    }
    const chosen = runs.filter(({ name }) => styles.has(name));
    const width = (count) => Math.floor((this.element.clientWidth - (count - 1) * GAP) / count) - FRAME;
    // Four in a row, or two and two.
    const fit = this.element.clientWidth >= 4 * NARROWEST ? 4 : this.element.clientWidth >= 2 * NARROWEST ? 2 : 1;
    const columns = chosen.length === 1 ? fit : Math.min(2, fit);
    const cards = chosen.length === 1 ? answers(chosen[0], runs, bounds, width(columns), theme) : severalAnswers(runs, styles, bounds, width(columns), theme);
    this.answers.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    this.answers.replaceChildren(...(chosen.length ? cards : []));
  }
}
