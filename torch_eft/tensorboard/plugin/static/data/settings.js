// What the reader has switched on, kept by the browser between visits.

const KEY = "torch_eft.settings";

const DEFAULTS = {
  steps: "log",
  values: "auto",
  residual: "auto",
  order_0: true,
  order_1: true,
  band: true,
  truncation: true,
  events: true,
  only: "all",
  open: {},
  sort: "",
  descending: false,
  grouped: true,
  live: true,
};

export function loadSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    // Only names and types that this version knows.
    const known = Object.entries(kept).filter(([name, value]) => value !== null && typeof value === typeof DEFAULTS[name]);
    return { ...DEFAULTS, ...Object.fromEntries(known) };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // A browser that keeps nothing: the settings last as long as the page.
  }
}
