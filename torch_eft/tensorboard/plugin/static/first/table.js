// All runs as a table: choose, search, sort; runs of one network and optimizer, as other seeds are, in one row.

import { h } from "../charts/dom.js";
import { number } from "../data/format.js";
import { swatch } from "../page/runs.js";
import { badge, ending } from "./badges.js";
import { COLUMNS } from "./columns.js";

const NAME = { key: "name", label: "run", title: "name", sort: (runs) => runs[0].name };

/** [-1, 0, 1] for sorting; what is not known comes last, in both directions. */
function compare(a, b, descending) {
  const missing = (value) => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
  const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return descending ? -order : order;
}

/** Rows: lists of runs, those alike together where the reader wants it. */
function rowsOf(runs, { grouped, sort, descending }) {
  const rows = new Map();
  for (const run of runs) {
    const key = grouped && run.info ? run.summary.alike : run.name;
    rows.set(key, [...(rows.get(key) ?? []), run]);
  }
  const column = [NAME, ...COLUMNS].find(({ key }) => key === sort);
  const list = [...rows.values()];
  return column ? list.sort((a, b) => compare(column.sort(a), column.sort(b), descending)) : list;
}

export class RunTable {
  /** @param {{toggle(names, on), only(name), details(run), change(name, value)}} actions */
  constructor(actions) {
    this.actions = actions;
    this.search = "";
    this.unfolded = new Set();
    this.drawn = null;
    this.input = h("input", { type: "search", placeholder: "search runs", "aria-label": "search runs", input: () => this.#find() });
    this.grouped = h("input", { type: "checkbox", change: () => actions.change("grouped", this.grouped.checked) });
    this.groupedLabel = h("label", { title: "runs of one network and optimizer, as other seeds are, in one row" }, this.grouped, "group runs alike");
    this.count = h("span", { class: "soft", role: "status" });
    this.head = h("tr", {});
    this.body = h("tbody", {});
    this.table = h("table", { class: "runs" }, h("thead", {}, this.head), this.body);
    this.scroll = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "runs" }, this.table);
    const title = h("h1", { class: "hidden" }, "Runs of torch_eft");
    this.element = h("section", { class: "run-table" }, title, h("div", { class: "find" }, this.input, this.groupedLabel, this.count), this.scroll);
  }

  #find() {
    this.search = this.input.value;
    this.draw(...this.drawn);
  }

  /**
   * @param {{name, info, problem, summary}[]} runs all
   * @param {Map<string, {color}>} styles of the chosen ones
   * @param {{sort, descending, grouped}} settings
   */
  draw(runs, styles, settings) {
    this.drawn = [runs, styles, settings];
    const wanted = this.search.toLowerCase().split(/\s+/).filter(Boolean);
    const text = ({ name, info, summary }) => `${name} ${info?.network ?? ""} ${info?.optimizer ?? ""} ${summary.regime.name} ${summary.theory.name}`.toLowerCase();
    const found = runs.filter((run) => wanted.every((word) => text(run).includes(word)));
    const focus = document.activeElement?.dataset?.focus;
    this.grouped.checked = settings.grouped;
    const alike = new Set(runs.filter(({ info }) => info).map(({ summary }) => summary.alike));
    this.groupedLabel.hidden = alike.size === runs.length;
    this.count.textContent = found.length === runs.length ? `${runs.length} runs` : `${found.length} of ${runs.length} runs`;
    this.head.replaceChildren(...[NAME, ...COLUMNS].map((column) => this.#heading(column, settings)), h("td", {}));
    this.body.replaceChildren(...rowsOf(found, settings).flatMap((row) => this.#rows(row, styles)));
    if (focus) [...this.element.querySelectorAll("[data-focus]")].find((element) => element.dataset.focus === focus)?.focus();
  }

  #heading({ key, label, title, numeric }, { sort, descending }) {
    const sorted = sort === key;
    const state = sorted ? (descending ? "descending" : "ascending") : "none";
    const press = () => {
      // Upwards, downwards, as they came.
      this.actions.change("sort", sorted && descending ? "" : key);
      this.actions.change("descending", sorted && !descending);
    };
    const arrow = h("span", { "aria-hidden": "true" }, sorted ? (descending ? " ↓" : " ↑") : "");
    return h("th", { scope: "col", "aria-sort": state, class: numeric ? "numeric" : "" }, h("button", { title, "aria-label": label === title ? label : `${label}: ${title}`, click: press, "data-sort": key, "data-focus": `sort ${key}` }, label, arrow));
  }

  #rows(row, styles) {
    if (row.length === 1) return [this.#row(row[0], styles, false)];
    const key = row[0].summary.alike;
    const open = this.unfolded.has(key);
    return [this.#group(row, styles, key, open), ...(open ? row.map((run) => this.#row(run, styles, true)) : [])];
  }

  #group(row, styles, key, open) {
    const chosen = row.filter(({ name }) => styles.has(name));
    const box = h("input", {
      type: "checkbox",
      "aria-label": `show ${row.length} runs of ${row[0].info.network}`,
      "data-focus": `group ${key}`,
      change: () => this.actions.toggle(row.map(({ name }) => name), box.checked),
    });
    box.checked = chosen.length === row.length;
    box.indeterminate = chosen.length > 0 && !box.checked;
    const unfold = () => {
      if (!this.unfolded.delete(key)) this.unfolded.add(key);
      this.draw(...this.drawn);
    };
    const fold = h("button", { class: "fold", "aria-expanded": String(open), "data-focus": `fold ${key}`, click: unfold }, open ? "▾" : "▸", ` ${row[0].info.network}`, h("span", { class: "soft" }, ` ${row.length} runs`));
    const name = h("th", { scope: "row" }, h("span", { class: "choose" }, box, fold));
    return h("tr", { class: "alike" }, name, COLUMNS.map((column) => h("td", { class: column.numeric ? "numeric" : "" }, column.cell(row))), h("td", {}));
  }

  #row(run, styles, inner) {
    const style = styles.get(run.name);
    const box = h("input", { type: "checkbox", "aria-label": `show ${run.name}`, "data-focus": `run ${run.name}`, change: () => this.actions.toggle([run.name], box.checked) });
    box.checked = Boolean(style);
    const label = h("label", { class: "choose", title: run.problem || run.info?.network || run.name }, box, swatch(style ?? { color: "transparent" }), h("span", { class: "name" }, run.name));
    const alone = styles.size === 1 && style;
    const only = h("button", { class: "link", "data-action": "only", "data-focus": `only ${run.name}`, "aria-label": `${alone ? "several runs" : `only ${run.name}`}`, click: () => this.actions.only(alone ? null : run.name) }, alone ? "several" : "only");
    const details = h("button", { class: "link", "data-action": "details", "data-focus": `details ${run.name}`, "aria-label": `details of ${run.name}`, click: () => this.actions.details(run) }, "details");
    return h(
      "tr",
      { "data-run": run.name, class: `${inner ? "inner" : ""}${style ? " chosen" : ""}` },
      h("th", { scope: "row" }, label, run.problem && h("span", { class: "problem-mark", title: run.problem }, " damaged")),
      COLUMNS.map((column) => h("td", { class: column.numeric ? "numeric" : "" }, column.cell([run]))),
      h("td", { class: "actions" }, only, details),
    );
  }
}

/** The one run there is: its name, badges, r and how it ended. */
export function runRow(run, actions) {
  const { info, summary } = run;
  return h(
    "div",
    { class: "run-row", "data-run": run.name },
    h("h1", { class: "name", title: run.name }, run.name),
    badge(summary.regime),
    badge(summary.theory, "theory"),
    info?.r > 0 && h("span", { title: `r = L/n: depth ${number(info.depth)} over width ${number(info.width)}` }, `r = ${number(info.r, 2)}`),
    ending(summary.ending),
    info?.network && h("span", { class: "soft network" }, `${info.network}; ${info.optimizer ?? ""}`),
    run.problem && h("span", { class: "problem-mark" }, run.problem),
    h("button", { class: "link", "data-action": "details", click: () => actions.details(run) }, "details"),
  );
}
