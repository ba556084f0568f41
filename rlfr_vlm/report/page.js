"use strict";
// Shared helpers, the tabs and the start. Text from the run reaches the page only as text nodes and attributes that `h` sets.

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(typeof child === "string" ? visible(child) : child);
  }
  return node;
}

// Hidden characters show as their code points and can do nothing; `marked` puts signs before line breaks and tabs.
const HIDDEN_CHARACTERS = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;

function visible(text, marked = false) {
  if (!HIDDEN_CHARACTERS.test(text)) return text;
  const fragment = document.createDocumentFragment();
  for (const piece of text.split(new RegExp(`(${HIDDEN_CHARACTERS.source})`))) {
    if (piece === "\n") fragment.append(marked ? glyph("⏎") : "", "\n");
    else if (piece === "\t") fragment.append(marked ? glyph("⇥") : "", "\t");
    else if (piece.length === 1 && HIDDEN_CHARACTERS.test(piece))
      fragment.append(glyph(`U+${piece.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
    else fragment.append(piece);
  }
  return fragment;
}

function glyph(text) {
  return h("i", { class: "glyph" }, text);
}

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isNumber = (value) => typeof value === "number";
const count = (value) => value.toLocaleString("en-US");
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
const percent = (value) =>
  isNumber(value) ? `${value !== 0 && Math.abs(value) < 0.01 ? (100 * value).toPrecision(2) : (100 * value).toFixed(1)} %` : "–";

// Four significant digits with a real minus sign; `signed` puts a plus before positive values.
function figure(value, signed = false) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}

function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function median(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

const VIEWS = { overview: showOverview, curves: showCurves, rollouts: showRollouts };
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
