// From the numbers of one quantity to what a figure draws: which lines, in which color and dash.
//
// One run: measured, order 0 and order 1 have colors of their own. Several: the color says which run, the
// line's dashes which series.

import { runStyle } from "../charts/theme.js";
import { seriesName } from "../data/format.js";
import { RESIDUALS, isExpansion, namedSeries, readQuantity, residual, residualKind, vanishes } from "../data/model.js";

const DASHES = { order_0: "1.5 3", order_1: "6 3", truncation: "1 4", given_start: "4 3", given: "1 3", taylor_1: "2 3", taylor_2: "7 2 2 2", taylor_model_1: "1.5 3", taylor_model_2: "3 2", taylor_model_3: "6 3", seeds_median: "2 2" };
const PARTS = [null, "7 2", "2 2", "7 2 2 2"];

// Values that mean something, in charts on a log axis.
const NOTHING = { value: 1, label: "1: nothing predicted" };
const REFERENCES = { replay_output_error: NOTHING, replay_ntk_error: NOTHING };

/** The dash pattern of a series; null is a solid line. */
function dashOf(series) {
  return series === "measured" ? null : (DASHES[series] ?? "4 2 1 2");
}

/** The color of a series where it is the only run. */
function seriesColor(theme, series) {
  if (isExpansion(series)) return theme.expanded;
  const own = { measured: theme.measured, order_0: theme.order0, order_1: theme.order1, truncation: theme.order1 };
  const replay = { taylor_model_1: theme.order0, taylor_model_2: theme.expanded, taylor_model_3: theme.order1 };
  return { ...own, ...replay }[series] ?? theme.extra;
}

/** The shaded bands of one run: ± σ or quantiles; of several runs the outer one alone. */
function bandsOf(quantity, color, theme, count) {
  const opacity = theme.bandOpacity / (count > 2 ? 2 : 1);
  const kinds = count > 1 ? ["band", "band90"] : ["band", "band90", "band68", "seeds", "replay", "error"];
  return kinds
    .filter((kind) => quantity[kind].length)
    .map((kind) => ({ kind, points: quantity[kind], color: color ?? { seeds: theme.extra, error: theme.measured }[kind] ?? theme.order1, opacity }));
}

/**
 * Where the line of an expansion ends before the measurements do: {step, value, color, text}, with the event that says
 * why; it may be told of another quantity that is expanded alike.
 */
function endMark(name, { series, points, color }, measured, events) {
  const last = points.filter(([, value]) => value !== null).at(-1);
  if (!last || !(measured.at(-1)?.[0] > last[0])) return null;
  const told = (events ?? []).filter((event) => event.step >= last[0] && event.text?.includes("expansion"));
  const why = told.find((event) => event.quantity === name) ?? told[0];
  return { step: last[0], value: last[1], color, text: why?.text ?? `${seriesName(series)}: it ends here, step ${last[0]}` };
}

/**
 * @param {string} name the quantity
 * @param {{name, index, raw, events, outlying}[]} runs those that have it; raw as in model.js; outlying ones set no axis
 * @param {{single, order_0, order_1, band, truncation, events, layers, residual, headline}} options what is switched
 *   on; single: one run is chosen; headline: a dot a measurement, and where there are quantiles nothing but them
 */
export function makePanel(name, runs, options, theme) {
  const { single } = options;
  const read = runs.map((run) => {
    const style = single ? { color: null, marker: null } : runStyle(theme, run.index);
    return { ...run, ...style, quantity: readQuantity(namedSeries(name, run.raw)) };
  });
  const kind = residualKind(read.map(({ quantity }) => quantity), options.residual);
  const panel = { name, runs: read, lines: [], bands: [], marks: [], events: [], residual: null, reference: REFERENCES[name] };
  const residualLines = [];
  for (const { name: run, color, marker, quantity, events, outlying } of read) {
    const line = (series, points, width) => ({
      series,
      points,
      width,
      color: color ?? seriesColor(theme, series),
      dash: dashOf(series),
      marker: series === "measured" ? marker : null,
      outlying,
    });
    const bands = bandsOf(quantity, color, theme, runs.length).map((band) => ({ ...band, outlying }));
    if (options.band) panel.bands.push(...bands);
    const plain = options.headline && quantity.band90.length > 0;
    const shown = quantity.orders.filter(({ series }) => options[series] ?? true);
    for (const { series, points } of shown) panel.lines.push(line(series, points, 1.5));
    for (const { series, points } of quantity.others) {
      if (series === "given_start" && !(single && options.band)) continue;
      if (isExpansion(series) && plain) continue;
      panel.lines.push(line(series, points, isExpansion(series) ? 1.6 : 1.2));
      const end = isExpansion(series) && endMark(name, panel.lines.at(-1), quantity.measured, events);
      if (end) panel.marks.push(end);
    }
    const layered = Object.values(quantity.layerTheory).some(({ median }) => median.length);
    if (single && options.band && options.layers && !layered) {
      for (const side of [1, 2]) {
        const edge = quantity.given.map((point) => [point[0], point[side]]);
        if (edge.length) panel.lines.push(line("given", edge, 1));
      }
    }
    if (single && options.truncation && options[quantity.best] && !plain) {
      for (const side of [1, 2]) {
        const edge = quantity.truncation.map((point) => [point[0], point[side]]);
        if (edge.length) panel.lines.push({ ...line("truncation", edge, 1), color: seriesColor(theme, quantity.best) });
      }
    }
    const bare = quantity.measured.length === 0 && quantity.orders.length === 0;
    if (bare || (single && options.layers)) {
      quantity.layers.forEach(({ series, points }, i) => {
        const own = color ?? theme.runs[(i + 2) % theme.runs.length];
        panel.lines.push({ ...line(series, points, bare ? 1.8 : 1.3), color: own, dash: layered ? null : PARTS[i % PARTS.length] });
        const { median, band90 } = quantity.layerTheory[series];
        if (median.length) {
          panel.lines.push({ ...line(series.replace("layer/", "layer-theory/"), median, 1), color: own, dash: DASHES.order_1 });
        }
        if (options.band && band90.length) panel.bands.push({ kind: "layer", points: band90, color: own, opacity: theme.bandOpacity / 2 });
      });
    }
    panel.lines.push({ ...line("measured", quantity.measured, 2), dots: options.headline });
    if (kind) {
      // With several runs only one residual per run stays readable: that of the highest order.
      for (const { series, points } of single ? shown : shown.slice(-1)) {
        if (kind === "difference" && vanishes(points)) continue;
        residualLines.push({ ...line(series, residual(quantity, series, kind), 1.5), dash: series === quantity.best ? null : "2 3" });
      }
    }
    if (options.events) {
      for (const event of events ?? []) {
        if (!event.quantity || event.quantity === name) {
          panel.events.push({ run, step: event.step, text: event.text, color: color ?? theme.event });
        }
      }
    }
  }
  if (kind && residualLines.some(({ points }) => points.length)) {
    panel.residual = { kind, ...RESIDUALS[kind], lines: residualLines };
  }
  return panel;
}
