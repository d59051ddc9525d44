// Axes of a small log-log chart, which the depth-width map and the law of the width share.

import { svg } from "./dom.js";
import { number } from "../data/format.js";
import { makeScale } from "../data/scale.js";

/**
 * @param {{width, height, xs: [low, high], ys: [low, high], xLabel, yLabel, percent}} size percent: of the vertical ticks
 * @returns {{box, x, y, axes, frame(label, children)}} scales in pixels, the axes' elements, and the SVG around all
 */
export function logPlane({ width, height, xs, ys, xLabel, yLabel, percent }, theme) {
  const box = { left: percent ? 66 : 38, right: width - 8, top: 8, bottom: height - 34 };
  const x = makeScale("log", xs, [box.left, box.right]);
  const y = makeScale("log", ys, [box.bottom, box.top]);
  const soft = { fill: theme.soft };
  const tick = (value) => (percent ? `${number(100 * value, 3)} %` : number(value, 3));
  const axes = [
    ticksOf(xs, width / 70).map((value) => [
      svg("line", { x1: x.to(value), x2: x.to(value), y1: box.bottom, y2: box.bottom + 4, stroke: theme.zero }),
      svg("text", { x: Math.min(x.to(value), width - 4 - 3.2 * number(value).length), y: box.bottom + 15, "text-anchor": "middle", ...soft }, number(value)),
    ]),
    ticksOf(ys, height / 32).map((value) => [
      svg("line", { x1: box.left - 4, x2: box.left, y1: y.to(value), y2: y.to(value), stroke: theme.zero }),
      svg("text", { x: box.left - 6, y: y.to(value) + 4, "text-anchor": "end", ...soft }, tick(value)),
    ]),
    svg("path", { d: `M${box.left},${box.top}V${box.bottom}H${box.right}`, stroke: theme.zero, fill: "none" }),
    svg("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle", ...soft }, xLabel),
    svg("text", { transform: `translate(10 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle", ...soft }, yLabel),
  ];
  const frame = (label, ...children) =>
    svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, "font-size": 11 }, children);
  return { box, x, y, axes, frame };
}

/** Powers of two where the axis is a few octaves of whole numbers; else decades. */
function ticksOf([low, high], most) {
  if (low < 1) return makeScale("log", [low, high], [0, 1]).ticks(Math.max(2, Math.floor(most)));
  const powers = [];
  for (let power = Math.ceil(Math.log2(low)); 2 ** power <= high; power += 1) powers.push(2 ** power);
  const stride = Math.max(1, Math.ceil(powers.length / Math.max(2, most)));
  return powers.filter((_, i) => i % stride === 0);
}

/** A dot with its words when pointed at. */
export function dot(cx, cy, color, words, theme) {
  return svg("circle", { cx, cy, r: 4.5, fill: color, stroke: theme.ground, "stroke-width": 1 }, svg("title", {}, words));
}

export function star(cx, cy, theme, words) {
  const points = [...Array(10).keys()].map((i) => {
    const [radius, angle] = [i % 2 ? 4.5 : 11, (Math.PI * (i - 2.5)) / 5];
    return `${(cx + radius * Math.cos(angle)).toFixed(1)},${(cy + radius * Math.sin(angle)).toFixed(1)}`;
  });
  return svg("polygon", { points: points.join(" "), fill: theme.star, stroke: theme.ink, "stroke-width": 1.2, "data-mark": "star" }, svg("title", {}, words));
}
