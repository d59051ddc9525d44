// The tab: which runs and quantities are on the screen, and when to look for new measurements.

import { mountChart } from "./chart.js";
import { openDetail, openDialog } from "./detail.js";
import { h } from "./dom.js";
import { download, fileName, pngBlob, sheet, svgText } from "./export.js";
import { number, signed } from "./format.js";
import { hasTheory, readQuantity, toCsv } from "./model.js";
import { makePanel } from "./panel.js";
import { runDetails, runList } from "./runs.js";
import { loadSettings, saveSettings } from "./settings.js";
import { currentTheme, onThemeChange, runStyle } from "./theme.js";
import { legendOf, toolbar } from "./toolbar.js";

const REFRESH_MS = 5000;
const FIRST_CHOICE = 5;
const EMPTY =
  "No run here has data of torch_eft yet. Attach EFTMonitor(probe=x_probe) to a training that logs to TensorBoard; " +
  "its runs appear here by themselves.";

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
    this.chosen = null;
    this.data = {};
    this.charts = [];
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
      this.chosen ??= names.length ? new Set(names.slice(-FIRST_CHOICE)) : null;
      const shown = this.shownRuns().filter(({ quantities }) => Object.keys(quantities).length);
      const series = await Promise.all(shown.map(({ name }) => this.source.series(name)));
      this.data = Object.fromEntries(shown.map(({ name }, i) => [name, series[i]]));
      this.problem = "";
    } catch (error) {
      this.problem = error.message;
    }
    const now = JSON.stringify([this.listing, this.data, this.problem]);
    if (now !== this.seen) this.render();
    this.seen = now;
    this.updateStatus();
  }

  shownRuns() {
    return (this.listing?.runs ?? []).filter(({ name }) => this.chosen?.has(name));
  }

  toggleRun(name) {
    if (!this.chosen.delete(name)) this.chosen.add(name);
    this.refresh();
  }

  change(name, value) {
    this.settings[name] = value;
    saveSettings(this.settings);
    this.render();
  }

  /** The quantities on the screen: in the order of the first run that explains them, the others after. */
  quantities() {
    const present = new Set(Object.values(this.data).flatMap((series) => Object.keys(series)));
    const explained = this.shownRuns().flatMap(({ info }) => Object.keys(info?.quantities ?? {}));
    const ordered = [...new Set([...explained, ...[...present].sort()])].filter((name) => present.has(name));
    if (this.settings.only === "all") return ordered;
    return ordered.filter((name) => Object.values(this.data).some((series) => series[name] && hasTheory(readQuantity(series[name]))));
  }

  /** Title, formula, unit, source of a quantity; its name where no run explains it. */
  about(name) {
    const explained = this.shownRuns().find(({ info }) => info?.quantities?.[name]);
    return { title: name.replaceAll("_", " "), ...explained?.info.quantities[name] };
  }

  panel(name, more = {}) {
    const runs = this.shownRuns()
      .map((run, index) => ({ name: run.name, index, raw: this.data[run.name]?.[name], events: run.info?.events }))
      .filter(({ raw }) => raw);
    const single = this.shownRuns().length === 1;
    return { ...makePanel(name, runs, { ...this.settings, ...more, single }, currentTheme()), title: this.about(name).title };
  }

  look() {
    return { steps: this.settings.steps, values: this.settings.values, theme: currentTheme() };
  }

  // ---- export

  exports(names, label) {
    const runs = this.shownRuns().map((run) => run.name);
    const columns = names.length === 1 ? 1 : Math.min(4, Math.ceil(Math.sqrt(names.length)));
    const size = names.length === 1 ? { width: 760, main: 330, residual: 130 } : { width: 360, main: 170, residual: 60 };
    const drawn = () => {
      const theme = currentTheme();
      const several = runs.length > 1;
      const header = runs.map((text, i) => ({ text, colour: several ? runStyle(theme, i).colour : theme.ink }));
      const panels = names.map((name) => this.panel(name));
      return sheet(panels, columns, { ...this.look(), ...size, font: 12, stepLabel: names.length === 1 }, header);
    };
    const file = fileName("eft", label, ...(runs.length === 1 ? runs : []));
    const picked = (series) => Object.fromEntries(Object.entries(series).filter(([name]) => names.includes(name)));
    return {
      csv: () => {
        const data = Object.fromEntries(Object.entries(this.data).map(([run, series]) => [run, picked(series)]));
        download(`${file}.csv`, toCsv(data), "text/csv");
      },
      svg: () => download(`${file}.svg`, svgText(drawn()), "image/svg+xml"),
      png: async () => download(`${file}.png`, await pngBlob(drawn()), "image/png"),
    };
  }

  // ---- drawing

  render() {
    const theme = currentTheme();
    document.documentElement.dataset.theme = theme.name;
    const scroll = this.root.scrollTop;
    if (!this.listing?.runs.length) {
      this.root.replaceChildren(h("p", { class: "empty" }, this.problem || EMPTY));
      return;
    }
    const shown = this.shownRuns();
    const names = this.quantities();
    const styles = new Map(shown.map(({ name }, i) => [name, this.styleOf(i, shown.length, theme)]));
    const actions = {
      toggle: (name) => this.toggleRun(name),
      details: (run) => openDialog(runDetails(run, this.listing.pages?.[run.name])),
    };
    this.status = h("p", { class: "status", role: "status" });
    const panels = names.map((name) => this.panel(name));
    const cards = panels.map((panel) => this.card(panel));
    const grid = h("div", { class: "grid" }, cards);
    const live = this.source.live;
    this.root.replaceChildren(
      runList(this.listing.runs, styles, actions),
      toolbar(this.settings, live, (name, value) => this.change(name, value), this.exports(names, "all")),
      legendOf(panels, shown.length <= 1, theme),
      names.length ? grid : h("p", { class: "empty" }, this.nothing(shown)),
      this.status,
    );
    this.updateStatus();
    this.fill(grid, cards, panels);
    this.root.scrollTop = scroll;
    this.detail?.redraw();
  }

  styleOf(index, count, theme) {
    return count === 1 ? { colour: theme.measured } : runStyle(theme, index);
  }

  nothing(shown) {
    if (shown.length === 0) return "Choose a run above.";
    if (this.settings.only === "theory") return "No theory for these runs; show all quantities to see what was measured.";
    return "These runs have no measurements yet.";
  }

  card(panel) {
    const about = this.about(panel.name);
    // "0: the NTK is frozen" is short for the card; the rest is in the enlarged view.
    const limit = (about.at_infinite_width ?? "").split(":")[0];
    const note = limit && limit.length < 12 && h("span", { class: "limit" }, `at infinite width: ${limit}`);
    return h(
      "section",
      { class: "card", "data-quantity": panel.name },
      h(
        "button",
        { class: "title", title: `${about.title}: enlarge`, click: () => this.enlarge(panel.name) },
        about.title,
      ),
      h("div", { class: "sub" }, this.latest(panel) ?? h("span", { class: "formula", title: about.formula }, about.formula), note),
      h("div", { class: "host" }),
    );
  }

  /** The last value of a single run, and its residual; marked where it is outside two standard deviations. */
  latest(panel) {
    if (this.shownRuns().length !== 1) return null;
    const value = panel.runs[0].quantity.measured.at(-1)?.[1];
    const last = panel.residual?.lines.at(-1)?.points.at(-1)?.[1];
    const outside = panel.residual?.kind === "z" && Math.abs(last) > 2;
    const beside = last !== undefined && `${panel.residual.short} ${signed(last, 2)}${outside ? " ▲" : ""}`;
    return h("span", { class: "latest" }, number(value), h("span", { class: outside ? "beside outside" : "beside" }, beside));
  }

  /** Draw the charts, as high as lets all of them onto one screen, within reason. */
  fill(grid, cards, panels) {
    if (cards.length === 0) return;
    const hosts = cards.map((card) => card.querySelector(".host"));
    const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
    const rows = Math.ceil(cards.length / columns);
    const room = (window.innerHeight - grid.getBoundingClientRect().top - 34) / rows - 76;
    const height = Math.max(120, Math.min(300, room));
    const charts = [];
    hosts.forEach((host, i) => {
      const residual = panels[i].residual ? Math.round(Math.max(38, height * 0.27)) : 0;
      const main = height - residual - (residual ? 10 : 0);
      const look = { ...this.look(), width: host.clientWidth, main, residual, font: 11 };
      charts.push(mountChart(host, panels[i], look, (step) => charts.forEach((chart) => chart.showStep(step))));
    });
  }

  enlarge(name) {
    this.detail = openDetail(name, {
      names: () => this.quantities(),
      panel: (quantity, more) => this.panel(quantity, more),
      about: (quantity) => this.about(quantity),
      look: () => this.look(),
      single: () => this.shownRuns().length <= 1,
      exports: (quantity) => this.exports([quantity], quantity),
    });
  }

  updateStatus() {
    if (!this.status) return;
    const others = this.listing?.others ?? 0;
    const parts = [
      this.problem && `${this.problem} What you see is as of the last answer.`,
      this.listing?.note,
      others && `${others} other ${others === 1 ? "run has" : "runs have"} no data of torch_eft.`,
      !this.problem && this.source.live && `Looked at ${new Date().toLocaleTimeString()}.`,
    ];
    this.status.textContent = parts.filter(Boolean).join(" ");
    this.status.classList.toggle("problem", Boolean(this.problem));
  }
}
