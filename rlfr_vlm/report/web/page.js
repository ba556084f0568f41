// The page of a run.

import { byId, h } from "./dom.js";
import { showFlow } from "./flow.js";
import { count } from "./format.js";
import { showLatents } from "./latents.js";
import { showOverview } from "./overview.js";
import { showRollouts } from "./rollouts.js";
import { runCharts } from "./run_charts.js";
import { showCurves } from "./run_curves.js";
import { RUN } from "./run_data.js";
import { once, startTabs } from "./tabs.js";

const VIEWS = {
  overview: once(showOverview),
  curves: once(showCurves),
  flow: once(showFlow),
  latents: once(showLatents),
  rollouts: showRollouts,
};

function start() {
  byId("run-name").textContent = RUN.overview.name;
  byId("run-state").textContent = RUN.overview.status;
  byId("run-state").dataset.state = RUN.overview.state;
  if (RUN.rollouts.numResponses)
    byId("tab-rollouts").append(
      " ",
      h("span", { class: "tally" }, count(RUN.rollouts.numResponses)),
    );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", runCharts.redraw);
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  startTabs(VIEWS, runCharts.showZoom);
}

document.addEventListener("DOMContentLoaded", start);
