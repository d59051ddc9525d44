// The tab: which runs and quantities are on the screen, and when to look for new measurements.

import { h } from "./charts/dom.js";
import { currentTheme, onThemeChange, runStyle } from "./charts/theme.js";
import { hasTheory, namedSeries, readQuantity } from "./data/model.js";
import { loadSettings, saveSettings } from "./data/settings.js";
import { FirstScreen } from "./first/screen.js";
import { Detail, openDialog } from "./page/detail.js";
import { exportsOf } from "./page/exports.js";
import { Cards, isOpen } from "./page/groups.js";
import { makePanel } from "./page/panel.js";
import { runDetails } from "./page/runs.js";
import { legendOf, toolbar } from "./page/toolbar.js";

const REFRESH_MS = 5000;
const FIRST_CHOICE = 5;
// What no theory bounds can grow without limit; this says the same within 0 and 2.
const BOUNDED = { ntk_drift: "ntk_kernel_distance" };
const EMPTY =
  "No run here has data of torch_eft yet. Attach EFTMonitor(probe=x_probe) to a training that logs to TensorBoard; " +
  "its runs appear here by themselves.";

/** The quantity that one stands for. */
function unbounded(name) {
  return Object.keys(BOUNDED).find((other) => BOUNDED[other] === name) ?? name;
}

export class App {
  /**
   * @param {Element} root where to draw
   * @param source a source as in source.js
   */
  constructor(root, source) {
    this.root = root;
    this.source = source;
    this.settings = loadSettings();
    this.listing = null;
    this.chosen = new Set();
    this.touched = false;
    this.data = {};
    this.verdicts = {};
    this.readings = {};
    this.page = null;
    this.first = new FirstScreen({
      toggle: (names, on) => this.toggle(names, on),
      only: (name) => this.chooseOnly(name),
      details: (run) => openDialog(runDetails(run, this.listing.pages?.[run.name])),
      change: (name, value) => this.change(name, value),
    });
    this.cards = new Cards({ enlarge: (name) => this.enlarge(name), toggled: (title, open) => this.fold(title, open) });
    this.detail = null;
    this.problem = "";
    this.seen = "";
    onThemeChange(() => this.render());
    window.addEventListener("resize", () => this.render());
  }

  /** Show what there is, then go on looking. */
  async start() {
    await this.refresh();
    if (!this.source.live) return;
    setInterval(() => {
      if (this.settings.live && !document.hidden) this.refresh();
    }, REFRESH_MS);
  }

  /** Fetch runs and series; draw if anything changed. */
  async refresh() {
    try {
      this.listing = await this.source.runs();
      const names = this.listing.runs.map(({ name }) => name);
      // The newest runs, until the reader chooses.
      if (!this.touched) this.chosen = new Set(names.slice(-FIRST_CHOICE));
      const shown = this.shownRuns().filter(({ quantities }) => Object.keys(quantities).length);
      const problems = [];
      // Each run on its own: one that cannot be read leaves the others.
      const read = async ({ name }) => {
        try {
          return [name, await this.source.series(name)];
        } catch (error) {
          problems.push(`${name}: ${error.message}`);
          return [name, { quantities: {}, verdicts: {}, readings: {} }];
        }
      };
      const found = await Promise.all(shown.map(read));
      this.data = Object.fromEntries(found.map(([name, { quantities }]) => [name, quantities]));
      this.verdicts = Object.fromEntries(found.map(([name, { verdicts }]) => [name, verdicts]));
      this.readings = Object.fromEntries(found.map(([name, { readings }]) => [name, readings]));
      this.problem = problems.join(" ");
    } catch (error) {
      this.problem = error.message;
    }
    const now = JSON.stringify([this.listing, this.data, this.verdicts, this.problem]);
    if (now !== this.seen) this.render();
    this.seen = now;
    this.updateStatus();
  }

  shownRuns() {
    return (this.listing?.runs ?? []).filter(({ name }) => this.chosen.has(name));
  }

  /** Show some runs, or not. */
  toggle(names, on) {
    this.touched = true;
    for (const name of names) this.chosen[on ? "add" : "delete"](name);
    this.refresh();
  }

  /** One run, or with null the newest ones. */
  chooseOnly(name) {
    this.touched = name !== null;
    this.chosen = new Set(name === null ? [] : [name]);
    this.refresh();
  }

  change(name, value) {
    this.settings[name] = value;
    saveSettings(this.settings);
    this.render();
  }

  /** A group is opened or closed by the reader: the browser does so itself, this keeps it and draws what is inside. */
  fold(title, open) {
    // Once the browser has done it.
    setTimeout(() => this.change("open", { ...this.settings.open, [title]: open }));
  }

  /** The quantities on the screen: in the order of the first run that explains them, the others after. */
  quantities() {
    const present = new Set(Object.values(this.data).flatMap((series) => Object.keys(series)));
    const explained = this.shownRuns().flatMap(({ info }) => Object.keys(info?.quantities ?? {}));
    const ordered = [...new Set([...explained, ...[...present].sort()])].filter((name) => present.has(name));
    if (this.settings.only === "all") return ordered;
    return ordered.filter((name) => Object.values(this.data).some((series) => series[name] && hasTheory(readQuantity(namedSeries(name, series[name])))));
  }

  /** Of each headline's quantities, the first one that is predicted; else the first one there is, or what bounds it. */
  headlines(names) {
    const judged = (name) => Object.values(this.verdicts).some((verdicts) => verdicts[name]);
    const present = (this.listing.headlines ?? []).map((choice) => choice.filter((name) => names.includes(name)));
    const bounded = (name) => (names.includes(BOUNDED[name]) ? BOUNDED[name] : name);
    return present.filter((choice) => choice.length).map((choice) => choice.find(judged) ?? bounded(choice[0]));
  }

  /** Title, formula, unit, source of a quantity; its name where no run explains it. */
  about(name) {
    const explained = this.shownRuns().find(({ info }) => info?.quantities?.[name]);
    return { title: name.replaceAll("_", " "), ...explained?.info.quantities[name] };
  }

  panel(name, more = {}) {
    const runs = this.shownRuns()
      .map((run, index) => ({
        name: run.name,
        index,
        raw: this.data[run.name]?.[name],
        events: run.info?.events,
        verdict: this.verdicts[run.name]?.[name],
        reading: this.readings[run.name]?.[name],
        unpredicted: run.unpredicted?.[unbounded(name)],
        theory: run.summary.theory,
        outlying: ["diverged", "early"].includes(run.summary.ending.state),
      }))
      .filter(({ raw }) => raw);
    const single = this.shownRuns().length === 1;
    return { ...makePanel(name, runs, { ...this.settings, ...more, single }, currentTheme()), title: this.about(name).title };
  }

  look() {
    return { steps: this.settings.steps, values: this.settings.values, theme: currentTheme() };
  }

  exports(names, label) {
    const runs = this.shownRuns().map((run) => run.name);
    return exportsOf(names, label, { runs, data: this.data, panel: (name) => this.panel(name), look: this.look() });
  }

  // ---- drawing

  /** Bring the page up to date. What can be open or under the mouse, the toolbar and the charts, stays in place. */
  render() {
    const theme = currentTheme();
    document.documentElement.dataset.theme = theme.name;
    if (!this.listing?.runs.length) {
      this.root.replaceChildren(h("p", { class: "empty" }, this.problem || EMPTY));
      return;
    }
    this.page ??= this.makePage();
    if (!this.page.cards.isConnected) this.root.replaceChildren(...Object.values(this.page));
    const shown = this.shownRuns();
    const single = shown.length <= 1;
    const styles = new Map(shown.map(({ name }, i) => [name, single ? { color: theme.measured } : runStyle(theme, i)]));
    const names = this.quantities();
    const large = this.headlines(names);
    const drawn = (name, more) => ({ panel: this.panel(name, more), about: this.about(name) });
    const first = large.map((name) => drawn(name, { headline: true }));
    const others = names.filter((name) => !large.includes(name)).map((name) => drawn(name));
    const unfolded = others.filter(({ about }) => isOpen(about, this.settings.open, first.length));
    this.first.draw(this.listing, styles, this.settings, theme);
    this.page.legend.replaceChildren(legendOf([...first, ...unfolded].map(({ panel }) => panel), single, theme));
    this.page.nothing.textContent = names.length ? "" : this.nothing(shown);
    this.cards.show(first, others, { single, look: this.look(), open: this.settings.open });
    this.detail?.redraw();
    this.updateStatus();
  }

  makePage() {
    const change = (name, value) => this.change(name, value);
    return {
      first: this.first.element,
      toolbar: toolbar(this.settings, this.source.live, change, () => this.exports(this.quantities(), "all")),
      legend: h("div", {}),
      nothing: h("p", { class: "empty" }),
      cards: this.cards.element,
      status: h("p", { class: "status", role: "status" }),
    };
  }

  nothing(shown) {
    if (shown.length === 0) return "Choose a run above.";
    if (this.settings.only === "theory") return "No theory for these runs; show all quantities to see what was measured.";
    return "These runs have no measurements yet.";
  }

  enlarge(name) {
    this.detail = new Detail(name, {
      names: () => this.quantities(),
      panel: (quantity, more) => this.panel(quantity, more),
      about: (quantity) => this.about(quantity),
      look: () => this.look(),
      single: () => this.shownRuns().length === 1,
      exports: (quantity) => this.exports([quantity], quantity),
    });
  }

  updateStatus() {
    if (!this.page) return;
    const { status } = this.page;
    const others = this.listing?.others ?? 0;
    const parts = [
      this.problem && `${this.problem} What you see is as of the last answer.`,
      this.listing?.note,
      others && `${others} other ${others === 1 ? "run has" : "runs have"} no data of torch_eft.`,
      !this.problem && this.source.live && `Looked at ${new Date().toLocaleTimeString()}.`,
    ];
    status.textContent = parts.filter(Boolean).join(" ");
    status.classList.toggle("problem", Boolean(this.problem));
  }
}
