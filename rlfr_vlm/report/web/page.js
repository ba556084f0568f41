// The start.

const VIEWS = { overview: showOverview, curves: showCurves, flow: showFlow, latents: showLatents, rollouts: showRollouts };
const RUN = JSON.parse(byId("run-data").textContent);

function openView(view) {
  selectTab(view);
  VIEWS[view]();
  zoomShown();
}

function start() {
  byId("run-name").textContent = RUN.overview.name;
  byId("run-state").textContent = RUN.overview.status;
  byId("run-state").dataset.state = RUN.overview.state;
  if (RUN.rollouts.numResponses) byId("tab-rollouts").append(" ", h("span", { class: "tally" }, count(RUN.rollouts.numResponses)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolourCharts);
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  startTabs(openView);
}

document.addEventListener("DOMContentLoaded", start);
