// The tabs and the start.

const VIEWS = { overview: showOverview, curves: showCurves, flow: showFlow, latents: showLatents, rollouts: showRollouts };
const RUN = JSON.parse(byId("run-data").textContent);

// The address bar holds the view and its settings (#rollouts?step=10), so that a reload or a copied address shows the same.
function readAddress() {
  const [view, settings] = location.hash.slice(1).split("?");
  return { view: view in VIEWS ? view : "overview", settings: new URLSearchParams(settings || "") };
}

function writeAddress(view, settings = {}) {
  const text = new URLSearchParams(Object.entries(settings).filter(([, value]) => value !== "" && value !== null)).toString();
  history.replaceState(null, "", `#${view}${text ? `?${text}` : ""}`);
}

function openView(view) {
  for (const name of Object.keys(VIEWS)) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
  VIEWS[view]();
  zoomShown();
}

function start() {
  byId("run-name").textContent = RUN.overview.name;
  byId("run-state").textContent = RUN.overview.status;
  byId("run-state").dataset.state = RUN.overview.state;
  if (RUN.rollouts.numResponses) byId("tab-rollouts").append(" ", h("span", { class: "tally" }, count(RUN.rollouts.numResponses)));
  for (const name of Object.keys(VIEWS)) {
    byId(`tab-${name}`).addEventListener("click", () => {
      writeAddress(name);
      openView(name);
    });
  }
  window.addEventListener("hashchange", () => openView(readAddress().view));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolourCharts);
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  openView(readAddress().view);
}

document.addEventListener("DOMContentLoaded", start);
