// The little Markdown that torch_eft's pages use: headings, lists, tables, paragraphs, **bold** and `code`.
// Anything else, HTML above all, stays text.

import { h } from "../charts/dom.js";

function inline(text) {
  return text.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) => {
    if (/^\*\*.+\*\*$/.test(part)) return h("strong", {}, part.slice(2, -2));
    if (/^`.+`$/.test(part)) return h("code", {}, part.slice(1, -1));
    return part;
  });
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(lines) {
  const [head, , ...body] = lines;
  const row = (line, tag) => h("tr", {}, cells(line).map((cell) => h(tag, {}, inline(cell))));
  return h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, body.map((line) => row(line, "td"))));
}

function kindOf(line) {
  if (/^#{1,6} /.test(line)) return "heading";
  if (/^\s*[-*] /.test(line)) return "list";
  if (/^\s*\|/.test(line)) return "table";
  return line.trim() ? "paragraph" : "blank";
}

/** A Markdown text as an element. */
export function markdown(text) {
  const blocks = [];
  for (const line of text.split("\n")) {
    const kind = kindOf(line);
    if (blocks.at(-1)?.kind === kind && kind !== "heading") blocks.at(-1).lines.push(line);
    else blocks.push({ kind, lines: [line] });
  }
  const make = {
    blank: () => [],
    heading: ([line]) => h("h3", {}, inline(line.replace(/^#+ /, ""))),
    list: (lines) => h("ul", {}, lines.map((line) => h("li", {}, inline(line.replace(/^\s*[-*] /, ""))))),
    table: (lines) => (lines.length > 2 ? table(lines) : h("p", {}, lines.join(" "))),
    paragraph: (lines) => h("p", {}, inline(lines.join(" "))),
  };
  return h("div", { class: "markdown" }, blocks.map(({ kind, lines }) => make[kind](lines)));
}
