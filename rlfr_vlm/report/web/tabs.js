// The views of a page, one at a time, and the address that says which: #rollouts?step=10, so that
// a reload or a copied address shows the same.

import { byId } from "./dom.js";

/** @type {{ views: Record<string, () => unknown>, opened: () => void }} */
const tabs = { views: {}, opened: () => {} }; // the first view is the one that a page opens with

/**
 * A view that is drawn once, however often it is opened.
 * @param {() => unknown} show
 */
export function once(show) {
  let shown = false;
  return () => {
    if (shown) return;
    shown = true;
    show();
  };
}

export function readAddress() {
  const [view, settings] = location.hash.slice(1).split("?");
  return {
    view: view in tabs.views ? view : Object.keys(tabs.views)[0],
    settings: new URLSearchParams(settings || ""),
  };
}

/**
 * @param {string} view
 * @param {Record<string, string | number | null | undefined>} settings
 */
export function writeAddress(view, settings = {}) {
  const told = Object.entries(settings).filter(([, value]) => value !== "" && value !== null);
  const text = new URLSearchParams(told.map(([name, value]) => [name, String(value)])).toString();
  history.replaceState(null, "", `#${view}${text ? `?${text}` : ""}`);
}

/** @param {string} view */
export function openView(view) {
  for (const name of Object.keys(tabs.views)) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
  tabs.views[view]();
  tabs.opened();
}

/**
 * @param {Record<string, () => unknown>} views
 * @param {() => void} opened is called after each opening
 */
export function startTabs(views, opened) {
  Object.assign(tabs, { views, opened });
  for (const name of Object.keys(views)) {
    byId(`tab-${name}`).addEventListener("click", () => {
      writeAddress(name);
      openView(name);
    });
  }
  window.addEventListener("hashchange", () => openView(readAddress().view));
  openView(readAddress().view);
}
