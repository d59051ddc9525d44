// Where TensorBoard starts the tab.

import { App } from "./app.js";
import { h } from "./charts/dom.js";
import { TensorBoardSource } from "./data/source.js";

/** Called by TensorBoard once this module is loaded. */
export async function render() {
  document.title = "EFT";
  document.documentElement.lang = "en";
  const style = h("link", { rel: "stylesheet", href: "static/style.css" });
  const styled = new Promise((resolve) => {
    style.addEventListener("load", resolve);
    style.addEventListener("error", resolve);
  });
  document.head.append(style);
  const root = h("main", {});
  document.body.append(root);
  await styled;
  await new App(root, new TensorBoardSource()).start();
}
