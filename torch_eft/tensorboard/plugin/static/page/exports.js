// What the export buttons hand to the reader: the numbers or the charts of some quantities of the chosen runs.

import { download, fileName, pngBlob, sheet, svgText } from "../charts/export.js";
import { stepRange } from "../charts/figure.js";
import { runStyle } from "../charts/theme.js";
import { toCsv } from "../data/model.js";

const LINES =
  "solid: measured; dotted: order 0 (infinite width); dashed: order 1 (finite width); shaded: ± σ over initializations, " +
  "or 68 and 90 % of networks around the median";

/**
 * @param {string[]} names of quantities
 * @param {string} label for the file's name
 * @param {{runs: string[], data, panel(name), look}} view what is on the screen
 * @returns {{csv(), svg(), png()}}
 */
export function exportsOf(names, label, { runs, data, panel, look }) {
  const columns = names.length === 1 ? 1 : Math.min(4, Math.ceil(Math.sqrt(names.length)));
  const size = names.length === 1 ? { width: 760, main: 330, residual: 130 } : { width: 360, main: 170, residual: 60 };
  const drawn = () => {
    const { theme } = look;
    const header = runs.map((text, i) => ({ text, color: runs.length > 1 ? runStyle(theme, i).color : theme.ink }));
    header.push({ text: LINES, color: theme.soft });
    const panels = names.map(panel);
    return sheet(panels, columns, { ...look, ...size, range: stepRange(panels), font: 12, stepLabel: names.length === 1 }, header);
  };
  const file = fileName("eft", label, ...(runs.length === 1 ? runs : []));
  const picked = (series) => Object.fromEntries(Object.entries(series).filter(([name]) => names.includes(name)));
  return {
    csv: () => {
      const chosen = Object.fromEntries(Object.entries(data).map(([run, series]) => [run, picked(series)]));
      download(`${file}.csv`, toCsv(chosen), "text/csv");
    },
    svg: () => download(`${file}.svg`, svgText(drawn()), "image/svg+xml"),
    png: async () => download(`${file}.png`, await pngBlob(drawn()), "image/png"),
  };
}
