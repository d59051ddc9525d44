// From the numbers of one quantity to what a figure draws: which lines, in which color and dash.
//
// One run: measured, order 0 and order 1 have colors of their own. Several: the color says which run, the
// line's dashes which series.

import { runStyle } from "../charts/theme.js";
import { RESIDUALS, readQuantity, residual, residualKind } from "../data/model.js";

const DASHES = { order_0: "1.5 3", order_1: "6 3", truncation: "1 4" };
const PARTS = [null, "7 2", "2 2", "7 2 2 2"];

/** The dash pattern of a series; null is a solid line. */
function dashOf(series) {
  return series === "measured" ? null : (DASHES[series] ?? "4 2 1 2");
}

/** The color of a series where it is the only run. */
function seriesColor(theme, series) {
  return { measured: theme.measured, order_0: theme.order0, order_1: theme.order1, truncation: theme.order1 }[series] ?? theme.extra;
}

/**
 * @param {string} name the quantity
 * @param {{name, index, raw, events}[]} runs those that have it; raw as in model.js
 * @param {{single, order_0, order_1, band, truncation, events, layers, residual}} options what is switched on; single:
 *   one run is chosen
 */
export function makePanel(name, runs, options, theme) {
  const { single } = options;
  const read = runs.map((run) => {
    const style = single ? { color: null, marker: null } : runStyle(theme, run.index);
    return { ...run, ...style, quantity: readQuantity(run.raw) };
  });
  const kind = residualKind(read.map(({ quantity }) => quantity), options.residual);
  const panel = { name, runs: read, lines: [], bands: [], events: [], residual: null };
  const residualLines = [];
  for (const { name: run, color, marker, quantity, events } of read) {
    const line = (series, points, width) => ({
      series,
      points,
      width,
      color: color ?? seriesColor(theme, series),
      dash: dashOf(series),
      marker: series === "measured" ? marker : null,
    });
    if (options.band && quantity.band.length) {
      panel.bands.push({
        points: quantity.band,
        color: color ?? theme.order1,
        opacity: theme.bandOpacity / (runs.length > 2 ? 2 : 1),
      });
    }
    const shown = quantity.orders.filter(({ series }) => options[series] ?? true);
    for (const { series, points } of shown) panel.lines.push(line(series, points, 1.5));
    for (const { series, points } of quantity.others) panel.lines.push(line(series, points, 1.2));
    if (single && options.truncation && options[quantity.best]) {
      for (const side of [1, 2]) {
        const edge = quantity.truncation.map((point) => [point[0], point[side]]);
        if (edge.length) panel.lines.push({ ...line("truncation", edge, 1), color: seriesColor(theme, quantity.best) });
      }
    }
    const bare = quantity.measured.length === 0 && quantity.orders.length === 0;
    if (bare || (single && options.layers)) {
      quantity.layers.forEach(({ series, points }, i) => {
        const own = color ?? theme.runs[(i + 2) % theme.runs.length];
        panel.lines.push({ ...line(series, points, bare ? 1.8 : 1.3), color: own, dash: PARTS[i % PARTS.length] });
      });
    }
    panel.lines.push(line("measured", quantity.measured, 2));
    if (kind) {
      // With several runs only one residual per run stays readable: that of the highest order.
      for (const { series } of single ? shown : shown.slice(-1)) {
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
