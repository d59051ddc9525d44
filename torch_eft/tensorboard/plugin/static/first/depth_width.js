// Where a network lies by depth and width: below the edge r = L/n and epsilon are small, above it is too deep.

import { svg } from "../charts/dom.js";
import { number } from "../data/format.js";
import { dot, logPlane, star } from "../charts/plane.js";

/**
 * @param {number} width in pixels
 * @param {{name, info, summary}[]} runs those with a depth and a width are drawn
 * @param {Map<string, {color}>} styles of the chosen runs; of a single one, the star
 * @param {[number, number]} edges r at the edge and where it is too deep, for networks whose epsilon is smaller
 */
export function depthWidthMap(width, height, runs, styles, edges, theme) {
  const placed = runs.filter(({ info }) => info?.depth > 0 && info?.width > 0);
  const chosen = placed.filter(({ name }) => styles.has(name));
  if (!chosen.length) return null;
  const widths = placed.map(({ info }) => info.width);
  const depths = placed.map(({ info }) => info.depth);
  const xs = [Math.min(8, Math.min(...widths) / 2), Math.max(1024, 2 * Math.max(...widths))];
  const ys = [1, Math.max(64, 2 * Math.max(...depths))];
  const { box, x, y, axes, frame } = logPlane({ width, height, xs, ys, xLabel: "width n", yLabel: "depth L" }, theme);
  const single = chosen.length === 1;
  const size = single ? chosen[0].summary.size : null;
  const [edge, deep] = size ? [size.edge, size.too_deep] : edges;
  const below = (r) => `${x.to(xs[0])},${y.to(r * xs[0])} ${x.to(xs[1])},${y.to(r * xs[1])} ${x.to(xs[1])},${y.to(ys[0])} ${x.to(xs[0])},${y.to(ys[0])}`;
  const clip = `map-${Math.round(x.to(xs[1]))}-${height}`;
  const safe = Math.max(box.top + 13, Math.min(box.bottom - 5, y.to(edge * x.from(box.right)) + 60));
  const others = placed.filter((run) => !(single && run === chosen[0]));
  const words = single
    ? `Depth against width: this network has depth ${chosen[0].info.depth} and width ${number(chosen[0].info.width)}, ` +
      `${size && size.larger >= 0.2 ? "beyond" : "below"} the edge at L/n = ${number(edge, 2)}; ${others.length} other runs are dots`
    : `Depth against width of ${placed.length} runs; the edge is at L/n = ${number(edge, 2)}, too deep from ${number(deep, 2)} on`;
  return frame(
    words,
    svg("clipPath", { id: clip }, svg("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top })),
    svg(
      "g",
      { "clip-path": `url(#${clip})` },
      svg("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top, fill: theme.deep }),
      svg("polygon", { points: below(deep), fill: theme.edge }),
      svg("polygon", { points: below(edge), fill: theme.safe }),
    ),
    axes,
    svg("text", { x: box.left + 6, y: box.top + 13, fill: theme.ink }, "too deep for 1/n"),
    svg("text", { x: box.right - 5, y: safe, fill: theme.ink, "text-anchor": "end" }, "r and ε small"),
    others.map(({ name, info }) =>
      dot(x.to(info.width), y.to(info.depth), styles.get(name)?.color ?? theme.soft, `${name}: L = ${info.depth}, n = ${number(info.width)}`, theme),
    ),
    single && star(x.to(chosen[0].info.width), y.to(chosen[0].info.depth), theme, `${chosen[0].name}: this run`),
  );
}
