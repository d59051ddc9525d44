// What the numbers of one quantity of one run mean. No drawing, no fetching.
//
// Raw series arrive as {series: [[step, value | null], ...]}: "measured"; "order_0" and "order_1", the theory;
// "minus_sigma" and "plus_sigma", one standard deviation over initializations around the highest order present;
// "truncation", the estimated size of the next order; "layer/NAME", measured, a part: a layer, or a Taylor term.

import { extent } from "./scale.js";

// Those that are no curve of their own: they are drawn around others, or follow from them.
const AROUND = ["minus_sigma", "plus_sigma", "truncation", "z_score", "ratio"];
const LAYER = "layer/";
const ORDER = /^order_\d+$/;

/** The value that says most beside the measured one: the highest order present, or null. */
function highestOrder(series) {
  return Object.keys(series).filter((name) => ORDER.test(name)).sort().at(-1) ?? null;
}

/** {measured, orders, others, layers: [{series, points}], band, truncation: [[step, low, high]], best}. */
export function readQuantity(raw) {
  const named = (name) => ({ series: name, points: raw[name] });
  const names = Object.keys(raw);
  const upper = new Map(raw.plus_sigma ?? []);
  const best = highestOrder(raw);
  const size = new Map(raw.truncation ?? []);
  const layer = (name) => name.startsWith(LAYER);
  return {
    measured: raw.measured ?? [],
    orders: names.filter((name) => ORDER.test(name)).sort().map(named),
    others: names.filter((name) => ![...AROUND, "measured"].includes(name) && !ORDER.test(name) && !layer(name)).map(named),
    layers: names.filter(layer).sort().map(named),
    band: (raw.minus_sigma ?? [])
      .map(([step, low]) => [step, low, upper.get(step) ?? null])
      .filter(([, low, high]) => low !== null && high !== null),
    truncation: (best ? raw[best] : [])
      .filter(([step, value]) => value !== null && Number.isFinite(size.get(step)))
      .map(([step, value]) => [step, value - size.get(step), value + size.get(step)]),
    best,
  };
}

export function hasTheory(quantity) {
  return quantity.orders.length > 0;
}

/** All at a step: {measured, orders: {series: value}, others, layers, sigma, truncation}; null where there is none. */
export function valuesAt(quantity, step) {
  const at = (points) => points.find(([s]) => s === step)?.[1] ?? null;
  const named = (list) => Object.fromEntries(list.map(({ series, points }) => [series, at(points)]));
  const half = (points) => {
    const found = points.find(([s]) => s === step);
    return found ? (found[2] - found[1]) / 2 : null;
  };
  return {
    measured: at(quantity.measured),
    orders: named(quantity.orders),
    others: named(quantity.others),
    layers: named(quantity.layers),
    sigma: half(quantity.band),
    truncation: half(quantity.truncation),
  };
}

export const RESIDUALS = {
  z: { label: "(measured − theory) / σ", short: "z" },
  relative: { label: "measured / theory − 1", short: "rel." },
  difference: { label: "measured − theory", short: "diff." },
};

/** The residual that a chart of these quantities can show: the one wanted, or the most telling one. */
export function residualKind(quantities, wanted) {
  const compared = quantities.filter((quantity) => hasTheory(quantity) && quantity.measured.length);
  if (compared.length === 0 || wanted === "off") return null;
  if (wanted !== "auto") return wanted;
  const positiveSigma = compared.some(({ band }) => band.some(([, low, high]) => high > low));
  if (positiveSigma) return "z";
  // Relative to a theory that vanishes somewhere says little.
  const vanishes = compared.some(({ orders }) => {
    const sizes = orders.at(-1).points.map(([, value]) => Math.abs(value)).filter(Number.isFinite);
    const [least, most] = extent(sizes);
    return !(least > most / 1000);
  });
  return vanishes ? "difference" : "relative";
}

/** [[step, residual]] of the measured values against one order, at the steps that have both. */
export function residual(quantity, order, kind) {
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
