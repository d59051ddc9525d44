// Colors of Okabe & Ito (2008), distinct for color-blind readers, on light and (some of them brightened) on dark ground.

const LIGHT = {
  name: "light",
  ground: "#ffffff",
  ink: "#202124",
  soft: "#5f6368",
  grid: "#e4e6ea",
  zero: "#b4b8bf",
  event: "#b35900",
  measured: "#D55E00",
  order0: "#5f6368",
  order1: "#0072B2",
  extra: "#009E73",
  safe: "#dcebf5",
  edge: "#f7e3c0",
  deep: "#efc1ab",
  star: "#F0E442",
  expanded: "#8a3a80",
  runs: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"],
  bandOpacity: 0.17,
};

const DARK = {
  name: "dark",
  ground: "#26272b",
  ink: "#e8eaed",
  soft: "#a7acb4",
  grid: "#3b3d43",
  zero: "#70757d",
  event: "#E69F00",
  measured: "#ff7f2a",
  order0: "#b0b5bd",
  order1: "#56B4E9",
  extra: "#2cc295",
  safe: "#23394a",
  edge: "#4d4023",
  deep: "#5e3326",
  star: "#F0E442",
  expanded: "#d174a8",
  runs: ["#56B4E9", "#ff7f2a", "#009E73", "#F0E442", "#CC79A7", "#E69F00", "#ffffff"],
  bandOpacity: 0.22,
};

/** TensorBoard marks its own document; elsewhere the reader's system decides. */
function isDark() {
  try {
    const body = window.parent !== window ? window.parent.document.body : null;
    if (body?.querySelector("tb-webapp")) return body.classList.contains("dark-mode");
  } catch {
    // A foreign page around us keeps its document to itself.
  }
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

export function currentTheme() {
  return isDark() ? DARK : LIGHT;
}

/** Call back whenever light and dark change places. */
export function onThemeChange(callback) {
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", callback);
  try {
    if (window.parent !== window) {
      const observer = new MutationObserver(callback);
      observer.observe(window.parent.document.body, { attributes: true, attributeFilter: ["class"] });
    }
  } catch {
    // See isDark.
  }
}

/** The color of the i-th chosen run, and the shape of its marker, which tells runs apart without color. */
export function runStyle(theme, index) {
  const markers = ["circle", "square", "triangle", "diamond", "cross"];
  return { color: theme.runs[index % theme.runs.length], marker: markers[index % markers.length] };
}
