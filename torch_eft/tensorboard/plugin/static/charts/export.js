// CSV, SVG and PNG files out of what is on the screen.

import { svg } from "./dom.js";
import { drawFigure } from "./figure.js";

/** Hand a file to the reader. */
export function download(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A name that every file system takes. */
export function fileName(...words) {
  return words.join("_").replace(/[^A-Za-z0-9.-]+/g, "_").slice(0, 120);
}

/** Panels as one SVG, `columns` to a row, with a line of text per run on top. */
export function sheet(panels, columns, look, header) {
  const [gap, line] = [14, look.font * 1.6];
  const top = header.length * line + gap;
  const drawn = panels.map((panel) => drawFigure(panel, { ...look, title: panel.title }));
  const rows = [];
  for (let i = 0; i < drawn.length; i += columns) rows.push(drawn.slice(i, i + columns));
  const children = [];
  let y = top;
  for (const row of rows) {
    row.forEach(({ element }, i) => {
      element.setAttribute("x", gap + i * (look.width + gap));
      element.setAttribute("y", y);
      children.push(element);
    });
    y += Math.max(...row.map(({ height }) => height)) + gap;
  }
  const width = Math.min(columns, drawn.length) * (look.width + gap) + gap;
  const words = header.map(({ text, color }, i) =>
    svg("text", { x: gap, y: (i + 1) * line, fill: color, "font-size": look.font, "font-family": "sans-serif" }, text),
  );
  return svg(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width, height: y, viewBox: `0 0 ${width} ${y}` },
    svg("rect", { width, height: y, fill: look.theme.ground }),
    words,
    children,
  );
}

export function svgText(element) {
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(element)}`;
}

/** An SVG as a PNG, twice as fine as on the screen. */
export async function pngBlob(element, scale = 2) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(element))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = element.getAttribute("width") * scale;
  canvas.height = element.getAttribute("height") * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.drawImage(image, 0, 0);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser could not make the PNG."))), "image/png");
  });
}
