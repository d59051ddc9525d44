// The switches above the charts, and the legend.

import { h, svg } from "../charts/dom.js";
import { seriesName } from "../data/format.js";

function choice(label, name, options, settings, changed) {
  const select = h(
    "select",
    { name, change: () => changed(name, select.value) },
    Object.entries(options).map(([value, word]) => h("option", { value, selected: settings[name] === value }, word)),
  );
  return h("label", {}, label, " ", select);
}

function toggle(label, name, settings, changed, title) {
  const box = h("input", { type: "checkbox", name, change: () => changed(name, box.checked) });
  box.checked = settings[name];
  return h("label", { title }, box, label);
}

/** changed(name, value) is called for every switch; exports as in exportButtons. */
export function toolbar(settings, live, changed, exports) {
  return h(
    "div",
    { class: "toolbar", role: "group", "aria-label": "display" },
    choice("Steps", "steps", { log: "log", linear: "linear" }, settings, changed),
    choice("Values", "values", { auto: "automatic", linear: "linear", log: "log" }, settings, changed),
    choice(
      "Residuals",
      "residual",
      { auto: "automatic", z: "z-score", relative: "relative", difference: "difference", off: "off" },
      settings,
      changed,
    ),
    choice("Show", "only", { all: "all quantities", theory: "with theory" }, settings, changed),
    toggle("order 0", "order_0", settings, changed, "the theory at infinite width"),
    toggle("order 1", "order_1", settings, changed, "the theory with 1/n corrections"),
    toggle("bands", "band", settings, changed, "one standard deviation over initializations, or 68 and 90 % of networks"),
    toggle("next order", "truncation", settings, changed, "estimated size of what the next order would add; one run only"),
    toggle("events", "events", settings, changed, "where a quantity leaves its band or a prediction its validity"),
    live && toggle("live", "live", settings, changed, "look for new measurements every few seconds"),
    exportButtons(exports),
  );
}

/** exports() gives {csv, svg, png}, functions, for what is on the screen when a button is pressed. */
export function exportButtons(exports) {
  const button = (kind) => h("button", { "data-export": kind, click: () => exports()[kind]() }, kind.toUpperCase());
  return h("span", { class: "export" }, "Export ", ["csv", "svg", "png"].map(button));
}

const BANDS = {
  band90: "90 % of networks",
  band68: "68 % of networks",
  band: "± σ over initializations",
  layer: "90 % of networks, by layer",
  seeds: "lowest .. highest of other seeds, measured",
  replay: "with ddNTK ± its distance from dNTK alone",
  error: "measured on random output directions, 68 %",
};

/** Which line is which; with several runs the color belongs to the run, so that lines here are of the text's. */
function legend(lines, bands, single, theme) {
  const sample = ({ series, color, dash }) =>
    svg(
      "svg",
      { width: 30, height: 12, "aria-hidden": "true" },
      svg("line", {
        x1: 1, x2: 29, y1: 6, y2: 6, stroke: single ? color : theme.ink, "stroke-width": series === "measured" ? 2.5 : 1.8,
        "stroke-dasharray": dash,
      }),
    );
  const bandColor = single ? theme.order1 : theme.ink;
  const band = (opacity, kind) =>
    svg(
      "svg",
      { width: 30, height: 12, "aria-hidden": "true" },
      svg("rect", { x: 1, y: 1, width: 28, height: 10, fill: (single && { seeds: theme.extra, error: theme.measured }[kind]) || bandColor, opacity }),
    );
  const quantiles = bands.includes("band90");
  const words = (series) => seriesName(series) + (series === "order_1" && quantiles ? "; with quantiles, the median" : "");
  return h(
    "div",
    { class: "legend" },
    lines.map((line) => h("span", {}, sample(line), " ", words(line.series))),
    bands.map((kind) => h("span", {}, band(theme.bandOpacity * (kind === "band68" ? 2 : 1), kind), ` ${BANDS[kind]}`)),
    !single && h("span", {}, "color and marker: the run"),
  );
}

/** The legend of some panels. */
export function legendOf(panels, single, theme) {
  const lines = new Map(panels.flatMap((panel) => panel.lines.filter(({ points }) => points.length).map((line) => [line.series, line])));
  const first = ["measured", "order_0", "order_1", "given_start"].filter((series) => lines.has(series));
  const others = [...lines.keys()].filter((series) => !first.includes(series)).sort();
  const kinds = new Set(panels.flatMap((panel) => panel.bands.map(({ kind }) => kind)));
  const bands = Object.keys(BANDS).filter((kind) => kinds.has(kind));
  return legend([...first, ...others].map((series) => lines.get(series)), bands, single, theme);
}
