// A figure on the page with a cursor: hover, or arrow keys, read off the values at a step.

import { h } from "./dom.js";
import { drawFigure } from "./figure.js";
import { nearest, stepsOf } from "./model.js";
import { readout } from "./readout.js";

/** Beside the cursor, inside the window. */
function place(tooltip, frame, figure, at) {
  const { left, top } = frame.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const fits = left + at + 12 + width <= window.innerWidth - 4;
  tooltip.style.left = `${fits ? at + 12 : Math.max(4 - left, at - 12 - width)}px`;
  tooltip.style.top = `${Math.min(figure.box.top, window.innerHeight - 4 - height - top)}px`;
}

/**
 * Put a panel into `host`, an element of some width.
 * @param {(step: number | null) => void} onStep called as the cursor moves
 * @returns {{showStep(step)}} to move this chart's cursor from outside
 */
export function mountChart(host, panel, look, onStep) {
  const figure = drawFigure(panel, look);
  const steps = stepsOf(panel.runs.map(({ quantity }) => quantity));
  const tooltip = h("div", { class: "tooltip", hidden: true });
  const frame = h("div", { class: "chart", tabindex: 0, "aria-label": `${panel.name}: arrow keys read values` });
  frame.append(figure.element, tooltip);
  host.replaceChildren(frame);
  let current = null;

  function showStep(step) {
    const visible = step !== null && step >= figure.x.low && step <= figure.x.high;
    figure.cursor.setAttribute("visibility", visible ? "visible" : "hidden");
    if (!visible) return;
    figure.cursor.setAttribute("x1", figure.x.to(step));
    figure.cursor.setAttribute("x2", figure.x.to(step));
  }

  function read(step) {
    if (step === current) return;
    current = step;
    tooltip.hidden = step === null;
    onStep(step);
    showStep(step);
    if (step === null) return;
    tooltip.replaceChildren(...readout(panel, step));
    place(tooltip, frame, figure, figure.x.to(step));
  }

  frame.addEventListener("pointermove", (event) => {
    const pixel = event.clientX - figure.element.getBoundingClientRect().left;
    // Nearest on the screen, which on a log axis is not nearest in steps.
    const index = nearest(steps.map((step) => figure.x.to(step)), pixel);
    read(steps[index] ?? null);
  });
  frame.addEventListener("pointerleave", () => read(null));
  frame.addEventListener("blur", () => read(null));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || steps.length === 0) return;
    event.preventDefault();
    const from = current === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(current);
    read(steps[Math.max(0, Math.min(steps.length - 1, from + move))]);
  });
  return { showStep };
}
