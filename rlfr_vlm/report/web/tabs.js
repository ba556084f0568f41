// The views of a page, one at a time, and the address that says which: #rollouts?step=10, so that a reload or a copied address shows the same.
// VIEWS is the page's own, the first of them the one that it opens with.

function readAddress() {
  const [view, settings] = location.hash.slice(1).split("?");
  return { view: view in VIEWS ? view : Object.keys(VIEWS)[0], settings: new URLSearchParams(settings || "") };
}

function writeAddress(view, settings = {}) {
  const text = new URLSearchParams(Object.entries(settings).filter(([, value]) => value !== "" && value !== null)).toString();
  history.replaceState(null, "", `#${view}${text ? `?${text}` : ""}`);
}

function selectTab(view) {
  for (const name of Object.keys(VIEWS)) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
}

function startTabs(open) {
  for (const name of Object.keys(VIEWS)) {
    byId(`tab-${name}`).addEventListener("click", () => {
      writeAddress(name);
      open(name);
    });
  }
  window.addEventListener("hashchange", () => open(readAddress().view));
  open(readAddress().view);
}
