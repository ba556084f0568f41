// What the page of an evaluation is given at once.

import { byId } from "./dom.js";

/** @import { EvaluationData } from "./data" */

/** @type {EvaluationData} */
export const EVALUATION = JSON.parse(byId("evaluation-data").textContent ?? "");
