// A ruler from lazy to rich: where this network is, and where the theory expects it.

import { h, svg } from "../charts/dom.js";
import { amount } from "../data/format.js";
import { makeScale } from "../data/scale.js";

const SCALE_HEIGHT = 74;
const [LEAST, MOST] = [0.003, 3];

/**
 * @param {number} width in pixels
 * @param {{drift, features}} changes of the NTK and of the hidden kernels; null where they are not known
 * @param {{low, high}} band of the NTK's drift, predicted; null without one
 * @param {[string, number | null][]} regimes their names and upper bounds
 */
export function kernelScale(width, { drift, features }, { low, high }, regimes, theme) {
  const seen = [drift, features, low, high].filter((value) => value > 0);
  if (!seen.length) return null;
  const limits = [Math.max(1e-5, Math.min(LEAST, ...seen.map((v) => v / 1.5))), Math.min(1e4, Math.max(MOST, ...seen.map((v) => v * 1.5)))];
  const x = makeScale("log", limits, [6, width - 6]);
  const at = (value) => Math.max(6, Math.min(width - 6, x.to(value)));
  const [top, bottom] = [32, 46];
  let from = limits[0];
  const parts = regimes.map(([name, bound], i) => {
    const to = Math.min(bound ?? limits[1], limits[1]);
    const [left, right] = [at(from), at(to)];
    from = to;
    const shade = svg("rect", { x: left, width: Math.max(0, right - left), y: top, height: bottom - top, fill: theme.order1, opacity: 0.1 + 0.18 * i });
    const label = svg("text", { x: (left + right) / 2, y: bottom + 13, "text-anchor": "middle", fill: theme.soft }, fitting(name, right - left));
    const apart = right - (i ? at(regimes[i - 1][1]) : 0) > 34;
    const edge = bound && bound < limits[1] && apart && svg("text", { x: right, y: bottom + 26, "text-anchor": "middle", fill: theme.soft }, `${100 * bound} %`);
    return [shade, label, edge];
  });
  const banded = low !== null && high !== null && high > 0;
  const theory = banded && bracket(at(Math.max(low, limits[0])), at(high), top, width, theme);
  const marks = [
    features > 0 && svg("path", { d: `M${at(features)},${top + 1}v${bottom - top - 2}`, stroke: theme.extra, "stroke-width": 3, "data-mark": "features" }),
    drift > 0 && svg("path", { d: diamond(at(drift), (top + bottom) / 2), fill: theme.measured, stroke: theme.ground, "stroke-width": 1.5, "data-mark": "drift" }),
  ];
  const words = [
    drift !== null && `the NTK moved ${amount(drift)}`,
    features !== null && `features ${amount(features)}`,
    banded && `the theory's 90 % band of the NTK is ${amount(low)} to ${amount(high)}`,
    `on a scale of ${regimes.map(([name, bound]) => (bound ? `${name} below ${100 * bound} %` : name)).join(", ")}`,
  ];
  return svg(
    "svg",
    { class: "kernel-scale", width, height: SCALE_HEIGHT, viewBox: `0 0 ${width} ${SCALE_HEIGHT}`, role: "img", "aria-label": words.filter(Boolean).join("; "), "font-size": 11 },
    parts, theory, marks,
  );
}

function fitting(name, room) {
  const letters = Math.floor(room / 6);
  return name.length <= letters ? name : name.split(" ")[0].length <= letters ? name.split(" ")[0] : "";
}

function bracket(left, right, top, width, theme) {
  const [a, b] = [left, Math.max(right, left + 3)];
  const y = top - 8;
  const middle = Math.max(46, Math.min(width - 46, (a + b) / 2));
  return [
    svg("path", { d: `M${a},${y + 5}V${y - 3}M${a},${y}H${b}M${b},${y + 5}V${y - 3}`, stroke: theme.order1, "stroke-width": 2, fill: "none", "data-mark": "band" }),
    svg("text", { x: middle, y: y - 8, "text-anchor": "middle", fill: theme.order1 }, "theory, 90 %"),
  ];
}

function diamond(cx, cy) {
  return `M${cx},${cy - 9}L${cx + 7},${cy}L${cx},${cy + 9}L${cx - 7},${cy}z`;
}

/** What the marks are, in words beside their colors. */
export function scaleKey(theme, { drift, features }) {
  const item = (color, words) => h("span", {}, h("span", { class: "dot", style: `background: ${color}`, "aria-hidden": "true" }), words);
  return h("p", { class: "key" }, drift !== null && item(theme.measured, "NTK"), features !== null && item(theme.extra, "features"));
}
