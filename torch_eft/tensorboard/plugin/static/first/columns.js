// The columns of the table of runs: what they show, and by what they sort.

import { h } from "../charts/dom.js";
import { amount, number } from "../data/format.js";
import { badge, ending } from "./badges.js";

const REGIME_ORDER = ["lazy", "weakly moving", "moving", "rich"];

function middle(values) {
  const sorted = values.filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : null;
}

/** "4.8 % .. 5.6 %" of several, their median when pointed at. */
function spread(values, text) {
  const known = values.filter((value) => Number.isFinite(value));
  if (!known.length) return "–";
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return text(low) === text(high) ? text(low) : h("span", { title: `median ${text(middle(known))}` }, `${text(low)} .. ${text(high)}`);
}

/** The same words of all, or how many there are. */
function common(runs, words) {
  const different = [...new Set(runs.map(words))];
  return different.length === 1 ? different[0] : `${different.length} kinds`;
}

const numeric = (key, label, title, value, text) => ({
  key,
  label,
  title,
  numeric: true,
  sort: (runs) => middle(runs.map(value)),
  cell: (runs) => (runs.length === 1 ? text(value(runs[0])) : spread(runs.map(value), text)),
});
/** Of several runs the median of each edge. */
const band = (runs) => {
  const [low, high] = ["low", "high"].map((edge) => middle(runs.map(({ summary }) => summary.drift[edge])));
  return low === null ? "–" : `${amount(low)} .. ${amount(high)}`;
};
const badges = (key, rank) => ({
  key,
  label: key,
  title: key === "regime" ? "how far from the kernel regime" : "how far the theory reaches",
  sort: (runs) => middle(runs.map(rank)),
  cell: (runs) => {
    const words = common(runs, ({ summary }) => summary[key].name);
    return runs.every(({ summary }) => summary[key].name === words) ? badge(runs[0].summary[key]) : words;
  },
});

/** cell and sort take the runs of a row: one, or those alike. */
export const COLUMNS = [
  numeric("depth", "L", "depth", ({ info }) => info?.depth ?? null, (v) => number(v)),
  numeric("width", "n", "width", ({ info }) => info?.width ?? null, (v) => number(v)),
  numeric("r", "r", "r = L/n, depth over width", ({ info }) => info?.r ?? null, (v) => number(v, 3)),
  {
    key: "optimizer",
    label: "optimizer",
    title: "optimizer",
    sort: (runs) => runs[0].info?.optimizer ?? "",
    cell: (runs) => {
      const text = common(runs, ({ info }) => info?.optimizer ?? "–");
      return h("span", { class: "cut", title: text }, text);
    },
  },
  numeric("measured", "drift", "last measured NTK drift", ({ summary }) => summary.drift.measured, amount),
  numeric("predicted", "predicted", "the theory's median of the NTK drift", ({ summary }) => summary.drift.predicted, amount),
  {
    key: "band",
    label: "90 % band",
    title: "90 % of networks with other seeds drift between these",
    numeric: true,
    sort: (runs) => middle(runs.map(({ summary }) => summary.drift.high)),
    cell: band,
  },
  numeric("features", "features", "representation change: of the hidden kernels", ({ summary }) => summary.features, amount),
  badges("regime", ({ summary }) => REGIME_ORDER.indexOf(summary.regime.name)),
  badges("theory", ({ summary }) => ["to 1/n", "order 0", "beyond 1/n", "measured only", "diverged"].indexOf(summary.theory.name)),
  {
    key: "ending",
    label: "steps",
    title: "how far the training came",
    numeric: true,
    sort: (runs) => parseInt(runs[0].summary.ending.short.match(/\d+/)?.[0] ?? "0", 10),
    cell: (runs) => (runs.length === 1 ? ending(runs[0].summary.ending, true) : common(runs, ({ summary }) => summary.ending.short)),
  },
];
