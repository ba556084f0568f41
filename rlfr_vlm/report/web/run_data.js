// What the page of a run is given at once.

import { byId } from "./dom.js";

/** @import { RunData } from "./data" */

/** @type {RunData} */
export const RUN = JSON.parse(byId("run-data").textContent ?? "");
