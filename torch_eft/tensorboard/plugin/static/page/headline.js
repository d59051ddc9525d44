// One of the quantities that a run is first asked about, large: its value, the verdict on it, and what was predicted.

import { Chart } from "../charts/chart.js";
import { h } from "../charts/dom.js";
import { valueText } from "../data/format.js";
import { badge } from "../first/badges.js";

const STATES = { inside: "inside", above: "outside", below: "outside" };
const WAITING = "no prediction of this quantity is known";

/** The last measured value; an en dash for none. */
function value(name, { quantity }) {
  return valueText(name, quantity.measured.at(-1)?.[1], 3);
}

/** What was predicted at the last step that has both, in numbers: phrases. */
function predictedWords(name, { step, measured, predicted: median, low, high, given_low: below, given_high: above, expansion, ends }) {
  const text = (number) => valueText(name, number, 3);
  const between = (a, b) => `${text(a)} .. ${text(b)}`;
  return [
    ends && `at step ${step}: measured ${text(measured)}`,
    median !== null && `predicted ${text(median)}`,
    low !== null && `90 % of networks ${between(low, high)}`,
    below !== null && above !== null && `given its start ${between(below, above)}`,
    expansion && "no band: it follows the path that this network takes",
  ].filter(Boolean);
}

/** Words, numbers and how they are shown, for one run: its verdict, or why there is none. */
function judged(name, run, marks) {
  const { verdict, unpredicted } = run;
  if (!verdict) return { state: "none", words: unpredicted ?? WAITING, numbers: [] };
  const ended = verdict.expansion && marks.at(-1)?.text;
  return { state: STATES[verdict.state] ?? "plain", words: ended || verdict.words, numbers: predictedWords(name, verdict) };
}

function single(name, run, marks) {
  const { state, words, numbers } = judged(name, run, marks);
  // What lies in a band that does not hold is no success.
  const doubtful = numbers.length && !run.verdict.expansion && ["caution", "none"].includes(run.theory?.tone);
  const doubt = doubtful ? [" ", badge({ ...run.theory, name: run.theory.name === "beyond 1/n" ? "does not hold" : "with caution" })] : [];
  const spans = numbers.map((phrase) => [h("span", {}, phrase), " "]);
  const lines = [h("p", { class: `verdict ${state}`, title: words }, words, doubt), h("p", { class: "numbers" }, spans)];
  // Where nothing is predicted, what the value means by itself is what the card has to say.
  return state === "none" && run.reading && run.theory?.name !== "diverged" ? [h("p", { class: "reading" }, run.reading), ...lines] : lines;
}

/** A row a run. */
function several(quantity, runs) {
  const row = (run) => {
    const { state, words } = judged(quantity, run, []);
    const short = state === "none" ? "no prediction" : run.verdict.short;
    const name = h("th", { scope: "row", title: run.name }, h("span", { class: "dot", style: `background: ${run.color}`, "aria-hidden": "true" }), run.name);
    return h("tr", { title: words }, name, h("td", {}, value(quantity, run)), h("td", { class: `verdict ${state}` }, short));
  };
  return [h("table", { class: "verdicts" }, h("tbody", {}, runs.map(row)))];
}

export class Headline {
  /** enlarge() is called when the title is pressed; onStep as in Chart. */
  constructor(name, enlarge, onStep) {
    this.title = h("button", { class: "title", click: enlarge });
    this.value = h("span", { class: "value" });
    this.words = h("div", { class: "words" });
    this.chart = new Chart(name, onStep);
    this.host = h("div", { class: "host" }, this.chart.element);
    this.head = h("div", { class: "head" }, this.title, this.value);
    this.element = h("section", { class: "card headline", "data-quantity": name }, this.head, this.words, this.host);
  }

  /** The words; alone: one run is chosen. */
  describe(panel, about, alone) {
    this.title.setAttribute("title", `${about.formula ?? about.title}: enlarge`);
    this.title.replaceChildren(h("span", {}, about.title));
    this.value.textContent = alone ? value(panel.name, panel.runs[0]) : "";
    this.words.replaceChildren(...(alone ? single(panel.name, panel.runs[0], panel.marks) : several(panel.name, panel.runs)));
  }

  /** The height of all but the chart. */
  get frame() {
    return this.head.offsetHeight + this.words.offsetHeight;
  }

  /** The chart, `height` high without its steps. */
  draw(panel, look, height) {
    this.chart.draw(panel, { ...look, width: this.host.clientWidth, main: height, residual: 0, font: 12 });
  }
}
