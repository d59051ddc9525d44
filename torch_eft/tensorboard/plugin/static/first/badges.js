// The two badges of a run, and how it ended.

import { h } from "../charts/dom.js";

const SHAPES = { good: "●", plain: "◆", caution: "▲", bad: "■", none: "○" };

/** A badge of `summary`: its words, with the reason when pointed at. */
export function badge(found, label = "") {
  const name = label ? `${label}: ${found.name}` : found.name;
  return h("span", { class: `badge tone-${found.tone}`, title: found.reason }, h("span", { "aria-hidden": "true" }, `${SHAPES[found.tone]} `), name);
}

/** "ended at step 300", or in a table "300"; in color what did not end as planned. */
export function ending({ state, words, short }, inTable = false) {
  return h("span", { class: `ending ending-${state}`, title: words }, inTable ? short : words);
}
