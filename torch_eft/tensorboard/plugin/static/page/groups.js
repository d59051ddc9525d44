// The cards: the first quantities large, the others in groups that fold.

import { stepRange } from "../charts/figure.js";
import { h } from "../charts/dom.js";
import { Card } from "./card.js";
import { Headline } from "./headline.js";

const WIDE = 290;
const HEADLINE = 330;
const HEIGHT = 150;
const OTHERS = "Other quantities";

/** Lay elements out in at most `most` columns of at least `least` pixels; returns how many there are. */
function columns(grid, least, most) {
  const count = Math.max(1, Math.min(most, Math.floor(grid.clientWidth / least)));
  grid.style.gridTemplateColumns = `repeat(${count}, minmax(0, 1fr))`;
  return count;
}

/** Children replaced only if they are others: an open tooltip or a focus stays. */
function settle(parent, elements) {
  const same = elements.length === parent.children.length && elements.every((element, i) => element === parent.children[i]);
  if (!same) parent.replaceChildren(...elements);
}

/** Whether a quantity's group is open: as the reader left it; folded at first, unless there is nothing else. */
export function isOpen(about, open, headlines) {
  return open[about.group ?? OTHERS] ?? headlines === 0;
}

export class Cards {
  /**
   * @param {{enlarge(name), toggled(title, open)}} actions a title was pressed; the reader opened or closed a group
   */
  constructor(actions) {
    this.actions = actions;
    this.cards = new Map();
    this.folds = new Map();
    this.drawn = [];
    this.first = h("div", { class: "grid headlines" });
    this.groups = h("div", { class: "groups" });
    this.element = h("div", { class: "cards" }, this.first, this.groups);
  }

  #card(Kind, name) {
    const key = `${Kind.name} ${name}`;
    if (!this.cards.has(key)) this.cards.set(key, new Kind(name, () => this.actions.enlarge(name), (step) => this.#point(step)));
    return this.cards.get(key);
  }

  #fold(title) {
    if (!this.folds.has(title)) {
      const [label, grid] = [h("summary", {}), h("div", { class: "grid" })];
      const element = h("details", { class: "group", "data-group": title }, label, grid);
      // Opened by the reader, not by us, whose change is seen when it is no news any more.
      label.addEventListener("click", () => this.actions.toggled(title, !element.open));
      this.folds.set(title, { element, label, grid });
    }
    return this.folds.get(title);
  }

  /** All cursors to one step. */
  #point(step) {
    for (const { chart } of this.drawn) chart.showStep(step);
  }

  /**
   * @param {{panel, about}[]} first the large ones
   * @param {{panel, about}[]} others the rest; about.group is the title of its group
   * @param {{single, look, open}} view open: {title: whether that group is}, where the reader has decided
   */
  show(first, others, view) {
    const look = { ...view.look, range: stepRange([...first, ...others].map(({ panel }) => panel)) };
    this.drawn = [];
    const large = first.map(({ panel }) => this.#card(Headline, panel.name));
    settle(this.first, large.map(({ element }) => element));
    const groups = grouped(others);
    const folds = [...groups.keys()].map((title) => this.#fold(title));
    settle(this.groups, folds.map(({ element }) => element));
    const count = columns(this.first, HEADLINE, Math.max(1, large.length));
    large.forEach((card, i) => card.describe(first[i].panel, first[i].about, view.single));
    const rows = Math.ceil(large.length / count);
    const top = this.first.getBoundingClientRect().top + window.scrollY;
    const words = Math.max(0, ...large.map(({ frame }) => frame));
    const below = 40 * Math.min(folds.length, 4);
    const room = (window.innerHeight - top - below) / Math.max(1, rows) - words - 60;
    large.forEach((card, i) => card.draw(first[i].panel, look, Math.max(180, Math.min(340, room))));
    this.drawn.push(...large);
    [...groups.values()].forEach((members, i) => this.#showGroup(folds[i], members, isOpen(members[0].about, view.open, large.length), look, view.single));
  }

  #showGroup({ element, label, grid }, members, open, look, single) {
    label.textContent = `${element.dataset.group} (${members.length})`;
    element.open = open;
    const cards = members.map(({ panel }) => this.#card(Card, panel.name));
    settle(grid, open ? cards.map((card) => card.element) : []);
    if (!open) return;
    columns(grid, WIDE, Math.max(3, members.length));
    cards.forEach((card, i) => card.describe(members[i].panel, members[i].about, single));
    cards.forEach((card, i) => card.draw(members[i].panel, look, HEIGHT));
    this.drawn.push(...cards);
  }
}

/** {title: members}, in the order of the first of each. */
function grouped(others) {
  const groups = new Map();
  for (const item of others) {
    const title = item.about.group ?? OTHERS;
    groups.set(title, [...(groups.get(title) ?? []), item]);
  }
  return groups;
}
