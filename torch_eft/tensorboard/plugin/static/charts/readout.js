// The values at a step, as the tooltip shows them.

import { number, seriesName, signed, valueText } from "../data/format.js";
import { residual, valuesAt } from "../data/model.js";
import { h } from "./dom.js";

function residualAt(panel, quantity, step) {
  if (!panel.residual || !quantity.best) return null;
  return residual(quantity, quantity.best, panel.residual.kind).find(([s]) => s === step)?.[1] ?? null;
}

/** The value of an order; with its spread where the band is around it. */
function orderText(name, series, { orders, sigma }, best) {
  const spread = series === best && sigma !== null ? ` ± ${valueText(name, sigma, 2)}` : "";
  return valueText(name, orders[series]) + spread;
}

/** One run: a row a series. */
function column(panel, step) {
  const [{ quantity }] = panel.runs;
  const values = valuesAt(quantity, step);
  const layers = panel.lines.some(({ series }) => series.startsWith("layer/")) ? values.layers : {};
  const at = residualAt(panel, quantity, step);
  const rows = [
    ["measured", valueText(panel.name, values.measured)],
    ...Object.keys(values.orders).map((series) => [seriesName(series), orderText(panel.name, series, values, quantity.best)]),
    ...Object.entries({ ...values.others, ...layers }).map(([series, value]) => [seriesName(series), valueText(panel.name, value)]),
  ];
  for (const [name, [low, high]] of Object.entries(values.ranges)) rows.push([name, `${valueText(panel.name, low)} .. ${valueText(panel.name, high)}`]);
  if (values.quantile !== null && panel.residual?.kind !== "quantile") rows.push(["share of networks below", number(values.quantile, 2)]);
  if (values.truncation !== null) rows.push(["next order, estimated", valueText(panel.name, values.truncation, 2)]);
  if (at !== null) rows.push([panel.residual.label, panel.residual.kind === "quantile" ? number(at, 2) : signed(at)]);
  return h("table", {}, rows.map(([name, value]) => h("tr", {}, h("th", {}, name), h("td", {}, value))));
}

/** Several runs: a row a run, a column a series. */
function grid(panel, step) {
  const series = [...new Set(panel.runs.flatMap(({ quantity }) => quantity.orders.map((order) => order.series)))].sort();
  const head = ["measured", ...series.map((name) => name.replace("_", " ")), panel.residual?.short];
  const cell = (text) => h("td", {}, text);
  const row = ({ name, color, quantity }) => {
    const values = valuesAt(quantity, step);
    const at = residualAt(panel, quantity, step);
    return h(
      "tr",
      {},
      h("th", {}, h("span", { class: "dot", style: `background: ${color}`, "aria-hidden": "true" }), name),
      cell(valueText(panel.name, values.measured)),
      series.map((order) => cell(orderText(panel.name, order, values, quantity.best))),
      panel.residual && cell(at === null ? "–" : panel.residual.kind === "quantile" ? number(at, 2) : signed(at)),
    );
  };
  return h(
    "table",
    {},
    h("tr", {}, h("th", {}), head.filter(Boolean).map(cell)),
    panel.runs.filter(({ quantity }) => valuesAt(quantity, step).measured !== null || quantity.best).map(row),
  );
}

/** The tooltip's content at a step. */
export function readout(panel, step) {
  const told = [...panel.events, ...panel.marks].filter((event) => event.step === step).map(({ text }) => text);
  const events = [...new Set(told)].map((text) => h("p", { class: "event" }, text));
  return [h("div", { class: "step" }, `step ${step}`), panel.runs.length === 1 ? column(panel, step) : grid(panel, step), ...events];
}
