// Numbers and names of series as text.

const SERIES = {
  measured: "measured",
  order_0: "order 0 (infinite width)",
  order_1: "order 1 (finite width)",
  truncation: "± estimated next order",
  given_start: "median, given this network's outputs at the start",
  given: "90 %, given this network's outputs at the start",
  taylor_1: "expansion about theta_0, with dNTK",
  taylor_2: "expansion about theta_0, with dNTK and ddNTK",
  taylor_model_1: "next steps with frozen NTK (infinite width)",
  taylor_model_2: "next steps with dNTK",
  taylor_model_3: "next steps with dNTK and ddNTK",
  seeds_median: "median of other seeds, measured",
};

/** A number to `digits` significant digits, with a true minus sign; an en dash for none. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const short = size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : value.toPrecision(digits);
  const [mantissa, exponent] = short.split("e");
  const trimmed = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
  return (exponent ? `${trimmed}e${Number(exponent)}` : trimmed).replaceAll("-", "−");
}

/** A relative change in words, as torch_eft.results.regime.amount says it: "5.0 %", "770 %", or from 10 on "12×". */
export function amount(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0 %";
  if (Math.abs(value) >= 10) return `${number(value, 3)}×`;
  return Math.abs(value) < 0.995 ? `${twoDigits(100 * value)} %` : `${10 * Math.round(10 * value)} %`;
}

function twoDigits(value) {
  return (Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toPrecision(2)).replaceAll("-", "−");
}

/** The same, always with its sign. */
export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** Quantities that are changes relative to the start, shown in percent. */
export function isRelative(name) {
  return name === "ntk_drift" || name === "representation_change";
}

/** A value of a quantity as its reader wants it. */
export function valueText(name, value, digits = 4) {
  return isRelative(name) ? amount(value) : number(value, digits);
}

/** A series' name for readers. */
export function seriesName(series) {
  const part = series.match(/^layer\/(order_)?(.*)$/);
  if (part) return part[1] ? `term of order ${part[2]}` : `layer ${part[2]}`;
  const predicted = series.match(/^layer-theory\/(.*)$/);
  if (predicted) return `median of layer ${predicted[1]}`;
  return SERIES[series] ?? series.replaceAll("_", " ");
}

/** The same, where there is little room. */
export function shortName(series) {
  return series === "truncation" ? "next order" : seriesName(series).split(/ \(|,/)[0];
}
