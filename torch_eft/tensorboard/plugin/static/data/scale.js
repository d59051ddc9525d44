// From values to pixels, and the ticks between.

/** Decimal ticks, about `count` of them, within [low, high]. */
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.7);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(i * step || 0);
  // Decimal fractions such as 0.30000000000000004.
  return ticks.map((tick) => Number(tick.toPrecision(12)));
}

/** Powers of ten within [low, high], thinned to `count`; with 2 and 5 between them where there is room. */
function logTicks(low, high, count) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const inside = (tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9);
  const decades = [];
  for (let power = first; power <= last; power += 1) decades.push(power);
  const fine = decades.flatMap((power) => [1, 2, 5].map((factor) => Number(`${factor}e${power}`))).filter(inside);
  if (fine.length < 2) return linearTicks(low, high, count).filter((tick) => tick > 0);
  if (fine.length <= count + 1) return fine;
  const stride = Math.ceil((decades.length - 1) / count);
  const coarse = decades.filter((power) => power % stride === 0).map((power) => Number(`1e${power}`)).filter(inside);
  return coarse.length >= 2 ? coarse : fine.filter((_, i) => i % Math.ceil(fine.length / count) === 0);
}

/**
 * A scale from [low, high] to [start, end] pixels.
 * kind: "linear"; "log", for positive values; "steps", log(1 + step), which has room for step 0.
 */
export function makeScale(kind, [low, high], [start, end]) {
  const forward = { linear: (v) => v, log: Math.log10, steps: Math.log1p }[kind];
  const back = { linear: (v) => v, log: (v) => 10 ** v, steps: Math.expm1 }[kind];
  const [a, b] = [forward(low), forward(high)];
  const slope = (end - start) / (b - a || 1);
  return {
    low,
    high,
    to: (value) => start + (forward(value) - a) * slope,
    from: (pixel) => back(a + (pixel - start) / slope),
    ticks(count) {
      if (kind === "linear") return linearTicks(low, high, count);
      if (kind === "log") return logTicks(low, high, count);
      if (high < 3) return linearTicks(low, high, count).filter(Number.isInteger);
      const ticks = logTicks(Math.max(low, 1), high, count);
      return low < 1 ? [0, ...ticks] : ticks;
    },
  };
}

/** [smallest, largest]; not by Math.min(...values), which fails for very many. */
export function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** Limits with a margin around the extremes of some values; null if there are none. */
export function limitsOf(values, kind, margin = 0.06) {
  const usable = values.filter((v) => Number.isFinite(v) && (kind !== "log" || v > 0));
  if (usable.length === 0) return null;
  const [low, high] = extent(usable);
  if (kind === "log") {
    const factor = Math.max((high / low) ** margin, 1.01);
    return [low / factor, high * factor];
  }
  const room = (high - low) * margin || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}
