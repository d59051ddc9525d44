// One panel as an SVG that stands alone: all colors and sizes are attributes, so that an export looks the same.

import { isRelative, number, shortName } from "../data/format.js";
import { svg } from "./dom.js";
import { extent, limitsOf, makeScale } from "../data/scale.js";

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
// A forecast that explodes must not flatten what was measured: beyond this many times it, the line leaves the chart.
const BLOW_UP = 10;

/** Limits of the values: all that was measured, and the theory as far as it is of comparable size. */
function valueLimits(panel, kind) {
  const finite = (points) => points.flatMap(([, ...values]) => values).filter((v) => v !== null);
  const counted = withoutOutlying(panel.lines);
  const measured = counted.filter((line) => line.series === "measured").flatMap((line) => finite(line.points));
  const theory = counted.filter((line) => line.series !== "measured").flatMap((line) => finite(line.points));
  const largest = extent([0, ...measured.map(Math.abs)])[1];
  const near = (factor) => (v) => largest === 0 || Math.abs(v) <= factor * largest;
  const band = withoutOutlying(panel.bands).flatMap(({ points }) => finite(points)).filter(near(BLOW_UP / 2));
  const positive = measured.filter((v) => v > 0);
  const floor = kind === "log" && positive.length ? extent(positive)[0] / 100 : -Infinity;
  const mark = panel.reference ? [panel.reference.value] : [];
  const values = [...measured, ...theory.filter(near(BLOW_UP)), ...band, ...mark].filter((v) => v >= floor);
  return limitsOf(values, kind) ?? (kind === "log" ? [0.1, 10] : [-1, 1]);
}

/** Lines or bands of the runs that set the axes: one that did not end as planned does so only where it is alone. */
function withoutOutlying(members) {
  const counted = members.filter(({ outlying }) => !outlying);
  return counted.some(({ points }) => points.length) ? counted : members;
}

/** The kind of the value axis: where runs, or one run's own values, differ by decades, a log axis. */
export function valuesKind(panel, wanted) {
  if (wanted !== "auto") return wanted;
  if (panel.reference) return "log"; // errors go over decades, and the mark is among them
  const measured = withoutOutlying(panel.lines).filter(({ series }) => series === "measured");
  const ends = measured.map(({ points }) => extent(points.map(([, value]) => value).filter((v) => v !== null)));
  const [least, most] = extent(ends.map(([, high]) => high).filter(Number.isFinite));
  const lowest = extent(ends.map(([low]) => low).filter(Number.isFinite))[0];
  if (!(lowest >= 0) || !(least > 0)) return "linear";
  const middle = measured.flatMap(({ points }) => points.map(([, value]) => value)).filter((v) => v > 0).sort((a, b) => a - b);
  return most > 6 * least || most > 1e3 * middle[Math.floor((middle.length - 1) / 2)] ? "log" : "linear";
}

/** A path through points, broken where a value is missing or cannot be drawn. */
function path(points, x, y) {
  let pen = "M";
  let drawn = "";
  for (const [step, value] of points) {
    const at = value === null ? NaN : y.to(value);
    if (Number.isFinite(at)) {
      drawn += `${pen}${x.to(step).toFixed(1)},${clip(at)}`;
      pen = "L";
    } else pen = "M";
  }
  return drawn;
}

/** SVG renderers stumble over coordinates of millions of pixels. */
function clip(pixel) {
  return Math.max(-9999, Math.min(9999, pixel)).toFixed(1);
}

function area(points, x, y) {
  const low = (value) => (y.log && value <= 0 ? y.low : value);
  const there = points.filter(([, , high]) => !y.log || high > 0);
  if (there.length < 2) return "";
  const upper = there.map(([step, , high]) => `${x.to(step).toFixed(1)},${clip(y.to(high))}`);
  const lower = there.map(([step, value]) => `${x.to(step).toFixed(1)},${clip(y.to(low(value)))}`).reverse();
  return `M${upper.join("L")}L${lower.join("L")}Z`;
}

function marker(shape, cx, cy, size, color) {
  const s = size;
  const shapes = {
    square: `M${cx - s},${cy - s}h${2 * s}v${2 * s}h${-2 * s}z`,
    triangle: `M${cx},${cy - 1.3 * s}L${cx + 1.2 * s},${cy + s}H${cx - 1.2 * s}z`,
    diamond: `M${cx},${cy - 1.4 * s}L${cx + 1.4 * s},${cy}L${cx},${cy + 1.4 * s}L${cx - 1.4 * s},${cy}z`,
    cross: `M${cx - s},${cy - s}L${cx + s},${cy + s}M${cx - s},${cy + s}L${cx + s},${cy - s}`,
  };
  if (shape === "circle") return svg("circle", { cx, cy, r: s, fill: color });
  return svg("path", { d: shapes[shape], fill: color, stroke: color, "stroke-width": shape === "cross" ? 2 : 0 });
}

// Lines for residuals: what is shaded, from the outside in; what must fit; what is right.
const RESIDUAL_SCALES = {
  z: { shaded: [[-2, 2], [-1, 1]], fits: [-2.5, 2.5], right: 0 },
  quantile: { shaded: [[0.05, 0.95], [0.16, 0.84]], fits: [0, 1], right: 0.5 },
};
// More dots than this run into each other.
const MOST_DOTS = 80;

/** A few markers along a line, at its end always; or a dot a value. */
function markers(line, x, y) {
  if (!line.marker && !line.dots) return [];
  const there = line.points.filter(([, v]) => v !== null && Number.isFinite(y.to(v)));
  if (there.length === 0) return [];
  if (line.dots && there.length <= MOST_DOTS) {
    return there.map(([step, v]) => marker(line.marker ?? "circle", x.to(step), Number(clip(y.to(v))), 2.4, line.color));
  }
  if (!line.marker) return [];
  const last = there.length - 1;
  const chosen = [...new Set([0.35, 0.7, 1].map((share) => Math.round(share * last)))];
  return chosen.map((i) => marker(line.marker, x.to(there[i][0]), Number(clip(y.to(there[i][1]))), 3, line.color));
}

function text(content, attributes) {
  return svg("text", attributes, content);
}

/** Frame, grid and ticks of one box; x labels only where asked for. */
function axes(box, x, y, counts, look, withSteps, percent) {
  const { theme, font } = look;
  const inPercent = (tick) => (y.high >= 10 ? `${number(tick, 4)}×` : `${number(100 * tick, 4)} %`);
  const value = (tick) => (percent ? inPercent(tick) : number(tick, 6));
  const parts = [];
  for (const tick of y.ticks(counts.y)) {
    const at = y.to(tick);
    parts.push(
      svg("line", { x1: box.left, x2: box.right, y1: at, y2: at, stroke: theme.grid }),
      text(value(tick), { x: box.left - 4, y: at + font * 0.35, "text-anchor": "end", fill: theme.soft }),
    );
  }
  let free = -Infinity;
  for (const tick of x.ticks(counts.x)) {
    const at = x.to(tick);
    const label = number(tick, 6);
    const half = label.length * font * 0.3;
    parts.push(svg("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, stroke: theme.grid }));
    if (withSteps && at - half > free && at + half < box.right + 14) {
      parts.push(text(label, { x: Math.min(at, box.right + 9 - half), y: box.bottom + font * 1.2, "text-anchor": "middle", fill: theme.soft }));
      free = at + half + 4;
    }
  }
  return parts;
}

function eventMarks(events, x, box, theme) {
  return events
    .filter(({ step }) => step >= x.low && step <= x.high)
    .map(({ step, text: words, color }) => {
      const at = x.to(step);
      return svg(
        "g",
        { class: "event" },
        svg("title", {}, `step ${step}: ${words}`),
        svg("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, stroke: color, "stroke-dasharray": "2 3" }),
        svg("path", { d: `M${at - 5},${box.top - 1}h10l-5,8z`, fill: color, stroke: theme.ground }),
      );
    });
}

/** Where lines end early, and why. */
function endMarks(marks, x, y, theme) {
  return marks
    .filter(({ value }) => Number.isFinite(y.to(value)))
    .map(({ step, value, color, text: words }) => {
      const [cx, cy] = [x.to(step), Number(clip(y.to(value)))];
      return svg(
        "g",
        { class: "end" },
        svg("title", {}, `step ${step}: ${words}`),
        svg("circle", { cx, cy, r: 6, fill: theme.ground, stroke: color, "stroke-width": 1.2 }),
        marker("cross", cx, cy, 3, color),
      );
    });
}

/** A value that means something: a line, and its meaning. */
function referenceMark({ value, label }, y, box, look) {
  const at = y.to(value);
  if (!(at >= box.top && at <= box.bottom)) return null;
  const { theme, font } = look;
  return svg(
    "g",
    { class: "reference" },
    svg("line", { x1: box.left, x2: box.right, y1: at, y2: at, stroke: theme.zero, "stroke-dasharray": "5 3" }),
    text(label, {
      x: box.left + 4, y: at - 4 < box.top + font ? at + font : at - 4, fill: theme.soft, "font-size": font * 0.9, stroke: theme.ground,
      "stroke-width": 3, "paint-order": "stroke",
    }),
  );
}

function drawLines(lines, x, y, clipId) {
  return svg(
    "g",
    { "clip-path": `url(#${clipId})`, fill: "none", "stroke-linejoin": "round" },
    lines.map((line) => [
      svg("path", {
        d: path(line.points, x, y),
        stroke: line.color,
        "stroke-width": line.width,
        "stroke-dasharray": line.dash,
        "data-series": line.series,
      }),
      // A single value has no line.
      line.points.length === 1 ? markers({ ...line, marker: line.marker ?? "circle" }, x, y) : markers(line, x, y),
    ]),
  );
}

/** What a reader would miss without a word: values that a log axis or the limits leave out. */
function missing(panel, y) {
  const values = ({ points }) => points.map(([, value]) => value).filter((value) => value !== null);
  const measured = panel.lines.filter(({ series }) => series === "measured").flatMap(values);
  if (y.log && measured.length && measured.every((value) => value <= 0)) return "nothing above 0 for a log axis";
  const off = panel.lines.filter((line) => values(line).some((v) => (v < y.low || v > y.high) && !(y.log && v <= 0)));
  if (off.length) return `off the chart: ${[...new Set(off.map(({ series }) => shortName(series)))].join(", ")}`;
  // A change that begins at 0 is no news.
  const later = ({ points }) => points.filter(([step]) => step > 0).map(([, value]) => value);
  return y.log && panel.lines.some((line) => line.series === "measured" && later(line).some((value) => value !== null && value <= 0)) ? "values ≤ 0 left out" : "";
}

/** First and last step of some panels. */
export function stepRange(panels) {
  const steps = panels.flatMap(({ lines }) => withoutOutlying(lines).flatMap(({ points }) => points.map(([step]) => step)));
  const [first, last] = extent(steps);
  return [Math.min(first, Math.max(1, last) - 1), Math.max(1, last)];
}

let clips = 0;

/**
 * Draw a panel.
 * @param {object} panel from makePanel
 * @param {{width, main, residual, font, steps, values, theme, range, title, stepLabel}} look sizes in pixels; steps
 *   are "linear" or "log", values may be "auto" too; range, of the steps; residual 0 leaves that box out; a title (for exports) takes two more lines.
 * @returns {{element, x, box, cursor}} the SVG, its step scale, the main box, and the cursor's line
 */
export function drawFigure(panel, look) {
  const { width, theme, font } = look;
  const head = look.title ? font * 2.2 : 8;
  const left = font * 4.8;
  const box = { left, right: width - 10, top: head, bottom: head + look.main };
  const gap = font * 0.9;
  const lower = panel.residual && look.residual > 0 ? { ...box, top: box.bottom + gap, bottom: box.bottom + gap + look.residual } : null;
  const bottom = lower ?? box;
  const height = bottom.bottom + font * (look.stepLabel ? 2.8 : 1.7);

  const [first, last] = look.range ?? stepRange([panel]);
  const x = makeScale(look.steps === "log" ? "steps" : "linear", [Math.max(0, first), last], [box.left, box.right]);
  const kind = valuesKind(panel, look.values);
  const y = makeScale(kind, valueLimits(panel, kind), [box.bottom, box.top]);
  y.log = kind === "log";
  const counts = { x: Math.max(2, Math.floor(width / 90)), y: Math.max(2, Math.min(9, Math.floor(look.main / 28))) };

  clips += 1;
  const ids = [`eft-clip-${clips}a`, `eft-clip-${clips}b`];
  const clipPath = (id, { left: l, right: r, top, bottom: b }) =>
    svg("clipPath", { id }, svg("rect", { x: l, y: top - 1, width: r - l + 4, height: b - top + 2 }));
  const cursor = svg("line", { y1: box.top, y2: bottom.bottom, stroke: theme.ink, "stroke-width": 1, visibility: "hidden" });

  const residualParts = () => {
    const { lines, kind, short, label } = panel.residual;
    const { shaded, fits, right } = RESIDUAL_SCALES[kind] ?? { shaded: [], fits: [0], right: 0 };
    const values = lines.flatMap(({ points }) => points.map(([, value]) => value));
    const r = makeScale("linear", limitsOf([...fits, ...values], "linear", 0.08), [lower.bottom, lower.top]);
    const inside = (v) => Math.max(r.low, Math.min(r.high, v));
    return [
      shaded.map(([low, high]) =>
        svg("rect", {
          x: box.left,
          width: box.right - box.left,
          y: r.to(inside(high)),
          height: r.to(inside(low)) - r.to(inside(high)),
          fill: theme.soft,
          opacity: 0.12,
        }),
      ),
      axes(lower, x, r, { x: counts.x, y: Math.max(2, Math.floor(look.residual / 26)) }, look, true),
      svg("line", { x1: box.left, x2: box.right, y1: r.to(right), y2: r.to(right), stroke: theme.zero }),
      drawLines(lines, x, r, ids[1]),
      text(look.stepLabel ? label : short, {
        ...(look.stepLabel
          ? { x: box.left + 4, y: lower.top + font }
          : { "text-anchor": "middle", transform: `translate(${font * 0.7} ${(lower.top + lower.bottom) / 2}) rotate(-90)` }),
        fill: theme.soft, "font-style": "italic", stroke: theme.ground, "stroke-width": 3, "paint-order": "stroke",
      }),
    ];
  };

  const element = svg(
    "svg",
    {
      xmlns: "http://www.w3.org/2000/svg",
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      "font-family": FONT,
      "font-size": font,
      role: "img",
      "aria-label": `${panel.name} against optimizer step`,
    },
    svg("rect", { width, height, fill: theme.ground }),
    svg("defs", {}, clipPath(ids[0], box), lower && clipPath(ids[1], lower)),
    look.title && text(look.title, {
      x: 6, y: font * 1.3, fill: theme.ink, "font-weight": 600,
      // A letter is about 0.62 of its size wide.
      "font-size": Math.min(font * 1.1, (width - 12) / (0.62 * look.title.length)).toFixed(1),
    }),
    axes(box, x, y, counts, look, !lower, isRelative(panel.name)),
    svg(
      "g",
      { "clip-path": `url(#${ids[0]})` },
      panel.bands.map((band) => svg("path", { d: area(band.points, x, y), fill: band.color, opacity: band.opacity })),
    ),
    panel.reference && referenceMark(panel.reference, y, box, look),
    drawLines(panel.lines, x, y, ids[0]),
    endMarks(panel.marks, x, y, theme),
    lower ? residualParts() : null,
    text(missing(panel, y), {
      x: box.right - 4, y: box.bottom - 4, "text-anchor": "end", fill: theme.soft, "font-size": font * 0.9, stroke: theme.ground,
      "stroke-width": 3, "paint-order": "stroke",
    }),
    eventMarks(panel.events, x, { ...box, bottom: bottom.bottom }, theme),
    look.stepLabel && text("optimizer step", {
      x: (box.left + box.right) / 2, y: height - font * 0.4, "text-anchor": "middle", fill: theme.soft,
    }),
    cursor,
  );
  return { element, x, box, cursor, height };
}
