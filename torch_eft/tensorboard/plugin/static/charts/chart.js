// A figure on the page with a cursor: hover, or arrow keys, read off the values at a step.

import { nearest, stepsOf } from "../data/model.js";
import { h } from "./dom.js";
import { drawFigure } from "./figure.js";
import { readout } from "./readout.js";

export class Chart {
  /**
   * @param {string} label for screen readers
   * @param {(step: number | null) => void} onStep called as the cursor moves
   */
  constructor(label, onStep) {
    this.onStep = onStep;
    this.current = null;
    this.steps = [];
    this.tooltip = h("div", { class: "tooltip", role: "status", hidden: true });
    this.element = h("div", {
      class: "chart",
      tabindex: 0,
      role: "group",
      "aria-label": `${label}: arrow keys read values`,
      pointermove: (event) => this.#point(event.clientX),
      pointerleave: () => this.#read(null),
      blur: () => this.#read(null),
      keydown: (event) => this.#key(event),
    });
  }

  /** Show a panel; a cursor that is set stays where it is. */
  draw(panel, look) {
    this.panel = panel;
    this.figure = drawFigure(panel, look);
    this.steps = stepsOf(panel.runs.map(({ quantity }) => quantity));
    this.element.replaceChildren(this.figure.element, this.tooltip);
    const step = this.steps.includes(this.current) ? this.current : null;
    this.current = undefined;
    this.#read(step);
  }

  /** Move the cursor's line, as another chart does. */
  showStep(step) {
    const { cursor, x } = this.figure;
    const visible = step !== null && step >= x.low && step <= x.high;
    cursor.setAttribute("visibility", visible ? "visible" : "hidden");
    if (!visible) return;
    cursor.setAttribute("x1", x.to(step));
    cursor.setAttribute("x2", x.to(step));
  }

  #read(step) {
    if (step === this.current) return;
    const moved = this.current !== undefined;
    this.current = step;
    this.tooltip.hidden = step === null;
    if (moved) this.onStep(step);
    this.showStep(step);
    if (step === null) return;
    this.tooltip.replaceChildren(...readout(this.panel, step));
    this.#place(this.figure.x.to(step));
  }

  /** The tooltip beside the cursor, inside the window. */
  #place(at) {
    const { left, top } = this.element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height, style } = this.tooltip;
    const fits = left + at + 12 + width <= window.innerWidth - 4;
    style.left = `${fits ? at + 12 : Math.max(4 - left, at - 12 - width)}px`;
    style.top = `${Math.min(this.figure.box.top, window.innerHeight - 4 - height - top)}px`;
  }

  #point(clientX) {
    const pixel = clientX - this.figure.element.getBoundingClientRect().left;
    // Nearest on the screen, which on a log axis is not nearest in steps.
    const index = nearest(this.steps.map((step) => this.figure.x.to(step)), pixel);
    this.#read(this.steps[index] ?? null);
  }

  #key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const { steps, current } = this;
    if (!move || steps.length === 0) return;
    event.preventDefault();
    const from = current === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(current);
    this.#read(steps[Math.max(0, Math.min(steps.length - 1, from + move))]);
  }
}
