// Where a report starts: the tab's page, on the data inside the report.

import { App } from "./app.js";
import { EmbeddedSource } from "./data/source.js";

const embedded = JSON.parse(document.getElementById("eft-data").textContent);
new App(document.querySelector("main"), new EmbeddedSource(embedded)).start();
