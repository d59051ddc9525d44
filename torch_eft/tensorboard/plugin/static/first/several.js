// Of several runs: the law of the width, and where each lies by depth and width.

import { h } from "../charts/dom.js";
import { depthWidthMap } from "./depth_width.js";
import { lawWords, lawful, widthLaw } from "./width_law.js";

const PAIR_HEIGHT = 196;

/** Two charts, as far as these runs have what they show. */
export function severalAnswers(runs, styles, bounds, width, theme) {
  const chosen = runs.filter(({ name }) => styles.has(name));
  const lawfulRuns = lawful(chosen);
  const card = (title, key, ...children) => h("article", { class: "answer", "data-answer": key }, h("h2", {}, title), children);
  const cards = [];
  if (lawfulRuns.length > 1) {
    cards.push(card("Does the drift follow L/n?", "law", widthLaw(width, PAIR_HEIGHT, lawfulRuns, styles, theme), h("p", { class: "soft" }, lawWords(lawfulRuns))));
  }
  const map = depthWidthMap(width, PAIR_HEIGHT, runs, styles, bounds.edges, theme);
  if (map) cards.push(card("Depth or width?", "shape", map, h("p", { class: "soft" }, "in color: the runs on the charts below")));
  return cards;
}
