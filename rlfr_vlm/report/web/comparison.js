// The page of a comparison.

import { comparedCharts, showCurves } from "./compared_curves.js";
import { showRuns } from "./compared_runs.js";
import { DATA } from "./comparison_data.js";
import { byId } from "./dom.js";
import { showFlips } from "./flips.js";
import { plural } from "./format.js";
import { once, startTabs } from "./tabs.js";

const VIEWS = { runs: once(showRuns), curves: once(showCurves), flips: once(showFlips) };

function start() {
  byId("comparison-name").textContent = DATA.name;
  byId("num-runs").textContent = plural(DATA.runs.length, "run");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", comparedCharts.redraw);
  startTabs(VIEWS, comparedCharts.showZoom);
}

document.addEventListener("DOMContentLoaded", start);
