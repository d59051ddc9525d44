// Of several runs: the NTK's final drift against L/n, and what the theory expects.

import { svg } from "../charts/dom.js";
import { amount, number } from "../data/format.js";
import { extent } from "../data/scale.js";
import { dot, logPlane } from "../charts/plane.js";

/** [low, high] of some positive numbers, with room around them: a factor of `room` at least. */
function around(values, room) {
  const [low, high] = extent(values);
  return [low / room, high * room];
}

/** Runs with a drift and r, by r; those that diverged or were interrupted have no final one. */
export function lawful(runs) {
  const there = ({ info, summary }) => info?.r > 0 && summary.drift.measured > 0 && !["diverged", "early"].includes(summary.ending.state);
  return runs.filter(there).sort((a, b) => a.info.r - b.info.r);
}

/**
 * @param {{name, info, summary}[]} runs from `lawful`, two at least
 * @param {Map<string, {color}>} styles of the chosen runs
 */
export function widthLaw(width, height, runs, styles, theme) {
  const predicted = runs.filter(({ summary }) => summary.drift.predicted > 0);
  const banded = predicted.filter(({ summary }) => summary.drift.low > 0);
  const drifts = runs.flatMap(({ summary: { drift } }) => [drift.measured, drift.predicted, drift.low, drift.high]).filter((v) => v > 0);
  const xs = around(runs.map(({ info }) => info.r), 1.6);
  const ys = around(drifts, 1.5);
  const { box, x, y, axes, frame } = logPlane(
    { width, height, xs, ys, xLabel: "r = L/n", yLabel: "final NTK drift", percent: true },
    theme,
  );
  const at = ({ info }, value) => `${x.to(info.r).toFixed(1)},${y.to(value).toFixed(1)}`;
  const median = predicted.map((run) => at(run, run.summary.drift.predicted));
  const band = [...banded.map((run) => at(run, run.summary.drift.high)), ...[...banded].reverse().map((run) => at(run, run.summary.drift.low))];
  const line = predicted.length > 1 ? svg("polyline", { points: median.join(" "), fill: "none", stroke: theme.order1, "stroke-width": 1.8, "stroke-dasharray": "6 3", "data-mark": "theory" }) : guide(runs, x, y, box, theme);
  const words = runs.map(({ name, info, summary }) => `${name}: r = ${number(info.r, 3)}, NTK moved ${amount(summary.drift.measured)}`);
  return frame(
    `Final NTK drift against L/n on log axes, ${runs.length} runs. ${words.join("; ")}`,
    axes,
    banded.length > 1 && svg("polygon", { points: band.join(" "), fill: theme.order1, opacity: theme.bandOpacity }),
    banded.length === 1 && svg("line", { x1: x.to(banded[0].info.r), x2: x.to(banded[0].info.r), y1: y.to(banded[0].summary.drift.low), y2: y.to(banded[0].summary.drift.high), stroke: theme.order1, "stroke-width": 5, opacity: 2 * theme.bandOpacity }),
    line,
    runs.map((run, i) => dot(x.to(run.info.r), y.to(run.summary.drift.measured), styles.get(run.name)?.color ?? theme.soft, words[i], theme)),
  );
}

/** Where nothing is predicted, the slope alone: drift proportional to L/n, through the middle of what was measured. */
function guide(runs, x, y, box, theme) {
  const middle = runs.reduce((sum, { info, summary }) => sum + Math.log(summary.drift.measured / info.r), 0) / runs.length;
  const value = (r) => r * Math.exp(middle);
  const inside = (pixel) => Math.max(box.top, Math.min(box.bottom, pixel));
  const ends = [runs[0].info.r, runs.at(-1).info.r].map((r) => `${x.to(r)},${inside(y.to(value(r)))}`);
  return svg("polyline", { points: ends.join(" "), fill: "none", stroke: theme.soft, "stroke-dasharray": "2 3", "data-mark": "guide" });
}

/** The exponent p of drift ~ r^p, by least squares; null where r differs by less than a factor of two. */
function exponent(runs) {
  const points = runs.map(({ info, summary }) => [Math.log(info.r), Math.log(summary.drift.measured)]);
  const [low, high] = extent(points.map(([a]) => a));
  if (points.length < 3 || high - low < Math.log(2) - 1e-9) return null;
  const mean = (i) => points.reduce((sum, point) => sum + point[i], 0) / points.length;
  const [a, b] = [mean(0), mean(1)];
  return points.reduce((sum, [p, q]) => sum + (p - a) * (q - b), 0) / points.reduce((sum, [p]) => sum + (p - a) ** 2, 0);
}

/** What was found, and what the lines are. */
export function lawWords(runs) {
  const power = exponent(runs);
  const found = power === null ? "" : `Over these runs drift ∝ r^${number(power, 2)}; order 1/n says r^1. `;
  return found + lineWords(runs);
}

function lineWords(runs) {
  const predicted = runs.filter(({ summary }) => summary.drift.predicted > 0);
  if (predicted.length > 1) return "dots: measured; dashed: the theory's median, shaded: 90 % of networks";
  return "dots: measured; dotted: proportional to L/n, as a guide (no theory for two of these runs)";
}
