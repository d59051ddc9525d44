// What the numbers of one quantity of one run mean. No drawing, no fetching.
//
// Raw series arrive as {series: [[step, value | null], ...]}: "measured"; "order_0" and "order_1", the theory;
// "minus_sigma" and "plus_sigma", one standard deviation over initializations around the highest order present;
// "band_68_low" .. "band_90_high", quantiles over initializations around the median, which order_1 then is;
// "given_start" with its _low and _high, the same for networks that start with this network's outputs; "quantile", the
// share of networks below the measured value; "taylor_1", "taylor_2", expansions along the realized path, which may end
// early; "seeds_low" .. "seeds_high", of networks trained beside this one; "truncation_low", "truncation_high", what
// Taylor models that were trained for a few steps leave out; "error_low", "error_high", of what is measured on random
// directions of the outputs; "truncation", the estimated size of the next order; "layer/NAME", measured, a part: a layer,
// or a Taylor term;
// "layer-theory/NAME/SERIES", what is predicted of it.

import { extent } from "./scale.js";

// Those that are no curve of their own: they are drawn around others, or follow from them.
const AROUND = [
  "minus_sigma", "plus_sigma", "truncation", "z_score", "ratio", "quantile", "given_start_low", "given_start_high",
  "band_68_low", "band_68_high", "band_90_low", "band_90_high", "seeds_low", "seeds_high", "truncation_low", "truncation_high",
  "error_low", "error_high",
];
const LAYER = "layer/";
const LAYER_THEORY = "layer-theory/";
const ORDER = /^order_\d+$/;

/** The value that says most beside the measured one: the highest order present, or null. */
function highestOrder(series) {
  return Object.keys(series).filter((name) => ORDER.test(name)).sort().at(-1) ?? null;
}

/** [[step, low, high]] of two series, where both are known. */
function between(low, high) {
  const upper = new Map(high ?? []);
  return (low ?? []).map(([step, value]) => [step, value, upper.get(step) ?? null]).filter(([, a, b]) => a !== null && b !== null);
}

/**
 * {measured, quantile: [[step, value]], orders, others, layers: [{series, points}], band, band90, band68, given,
 * truncation: [[step, low, high]], layerTheory: {layer: {median, band90}}, best}.
 */
export function readQuantity(raw) {
  const named = (name) => ({ series: name, points: raw[name] });
  const names = Object.keys(raw);
  const best = highestOrder(raw);
  const size = new Map(raw.truncation ?? []);
  const layer = (name) => name.startsWith(LAYER);
  const other = (name) => ![...AROUND, "measured"].includes(name) && !ORDER.test(name) && !layer(name) && !name.startsWith(LAYER_THEORY);
  const layers = names.filter(layer).sort();
  const band90 = between(raw.band_90_low, raw.band_90_high);
  const flat = new Set(band90.filter(([, low, high]) => !(high > low)).map(([step]) => step)); // all networks are alike
  const ofLayer = (name, series) => raw[`${LAYER_THEORY}${name.slice(LAYER.length)}/${series}`];
  return {
    measured: raw.measured ?? [],
    orders: names.filter((name) => ORDER.test(name)).sort().map(named),
    // An expansion that ended at once has its start alone.
    others: names.filter((name) => other(name) && !(isExpansion(name) && vanishes(raw[name]))).map(named),
    layers: layers.map(named),
    layerTheory: Object.fromEntries(
      layers.map((name) => [
        name,
        { median: ofLayer(name, "order_1") ?? [], band90: between(ofLayer(name, "band_90_low"), ofLayer(name, "band_90_high")) },
      ]),
    ),
    band: between(raw.minus_sigma, raw.plus_sigma),
    band90,
    band68: between(raw.band_68_low, raw.band_68_high),
    given: between(raw.given_start_low, raw.given_start_high),
    seeds: between(raw.seeds_low, raw.seeds_high),
    replay: between(raw.truncation_low, raw.truncation_high),
    error: between(raw.error_low, raw.error_high),
    quantile: (raw.quantile ?? []).filter(([step]) => !flat.has(step)),
    truncation: (best ? raw[best] : [])
      .filter(([step, value]) => value !== null && Number.isFinite(size.get(step)))
      .map(([step, value]) => [step, value - size.get(step), value + size.get(step)]),
    best,
  };
}

/** Series of a quantity under names that say what they are: the orders of replays are those of Taylor models. */
export function namedSeries(quantity, raw) {
  if (!quantity.startsWith("replay_")) return raw;
  return Object.fromEntries(Object.entries(raw).map(([series, points]) => [series.replace(/^order_/, "taylor_model_"), points]));
}

/** An expansion along the realized path. */
export function isExpansion(series) {
  return /^taylor_\d$/.test(series);
}

export function hasTheory(quantity) {
  return quantity.orders.length > 0 || quantity.others.some(({ series }) => series.startsWith("taylor_"));
}

/** All values are 0: what is measured is then the whole deviation, and needs no second chart. */
export function vanishes(points) {
  return points.every(([, value]) => value === null || value === 0);
}

/**
 * All at a step: {measured, quantile, orders: {series: value}, others, layers, sigma, truncation, ranges: {name: [low,
 * high]}}; null where there is none.
 */
export function valuesAt(quantity, step) {
  const at = (points) => points.find(([s]) => s === step)?.[1] ?? null;
  const named = (list) => Object.fromEntries(list.map(({ series, points }) => [series, at(points)]));
  const range = (points) => points.find(([s]) => s === step)?.slice(1) ?? null;
  const half = (points) => {
    const found = range(points);
    return found ? (found[1] - found[0]) / 2 : null;
  };
  const ranges = { "68 % of networks": quantity.band68, "90 % of networks": quantity.band90, "90 %, given its start": quantity.given, "other seeds, measured": quantity.seeds, "order 3 ± what order 2 lacks": quantity.replay, "measured, 68 %": quantity.error };
  return {
    measured: at(quantity.measured),
    orders: named(quantity.orders),
    others: named(quantity.others),
    layers: named(quantity.layers),
    sigma: half(quantity.band),
    truncation: half(quantity.truncation),
    quantile: at(quantity.quantile),
    ranges: Object.fromEntries(Object.entries(ranges).map(([name, points]) => [name, range(points)]).filter(([, found]) => found)),
  };
}

export const RESIDUALS = {
  z: { label: "(measured − theory) / σ", short: "z" },
  relative: { label: "measured / theory − 1", short: "rel." },
  difference: { label: "measured − theory", short: "diff." },
  quantile: { label: "share of networks below", short: "share" },
};

/** The residual that a chart of these quantities can show: the one wanted, or the most telling one. */
export function residualKind(quantities, wanted) {
  const positiveSigma = ({ band }) => band.some(([, low, high]) => high > low);
  const told = (quantity) => positiveSigma(quantity) || quantity.quantile.length || !vanishes(quantity.orders.at(-1).points);
  const compared = quantities.filter((quantity) => quantity.orders.length && quantity.measured.length && told(quantity));
  if (compared.length === 0 || wanted === "off") return null;
  if (wanted !== "auto") return wanted;
  if (compared.some(({ quantile }) => quantile.length)) return "quantile";
  if (compared.some(positiveSigma)) return "z";
  // Relative to a theory that vanishes somewhere says little.
  const nearZero = compared.some(({ orders }) => {
    const sizes = orders.at(-1).points.map(([, value]) => Math.abs(value)).filter(Number.isFinite);
    const [least, most] = extent(sizes);
    return !(least > most / 1000);
  });
  return nearZero ? "difference" : "relative";
}

/** [[step, residual]] of the measured values against one order, at the steps that have both. */
export function residual(quantity, order, kind) {
  if (kind === "quantile") return order === quantity.best ? quantity.quantile : [];
  const theory = new Map(quantity.orders.find(({ series }) => series === order)?.points ?? []);
  const sigma = new Map(quantity.band.map(([step, low, high]) => [step, (high - low) / 2]));
  const points = [];
  for (const [step, measured] of quantity.measured) {
    const expected = theory.get(step);
    if (measured === null || expected === null || expected === undefined) continue;
    const scale = { z: sigma.get(step), relative: Math.abs(expected), difference: 1 }[kind];
    if (scale > 0) points.push([step, (measured - expected) / scale]);
  }
  return points;
}

/** All steps at which anything is known, ascending. */
export function stepsOf(quantities) {
  const steps = new Set();
  for (const { measured, orders, others, layers } of quantities) {
    for (const points of [measured, ...[...orders, ...others, ...layers].map((series) => series.points)]) {
      for (const [step] of points) steps.add(step);
    }
  }
  return [...steps].sort((a, b) => a - b);
}

/** The index of the member nearest to a value; -1 for an empty list. */
export function nearest(members, value) {
  let best = -1;
  members.forEach((member, i) => {
    if (best < 0 || Math.abs(member - value) < Math.abs(members[best] - value)) best = i;
  });
  return best;
}

function csvCell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  // Spreadsheets run cells that begin like formulas; numbers stay numbers.
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** Long-format CSV of {run: {quantity: raw series}}: one line a value. */
export function toCsv(data) {
  const lines = ["run,quantity,series,step,value"];
  for (const [run, quantities] of Object.entries(data)) {
    for (const [quantity, raw] of Object.entries(quantities)) {
      for (const [series, points] of Object.entries(raw)) {
        for (const [step, value] of points) lines.push([run, quantity, series, step, value].map(csvCell).join(","));
      }
    }
  }
  return `${lines.join("\n")}\n`;
}
