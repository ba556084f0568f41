// The filters of the list of problems.

import { OUTCOMES } from "./benchmarks.js";
import { byId, h, part, parts } from "./dom.js";
import { EVALUATION } from "./evaluation_data.js";
import { FACETS, browser, textsOf, writeAddress } from "./evaluation_store.js";
import { ORDERS, TRAITS, facetNames, noTallies, passes } from "./filters.js";
import { count, plural, sum } from "./format.js";
import { drawRows, scrollToRow } from "./list.js";
import { drawProblem, turn } from "./problem.js";

/** @import { EvaluatedProblem, Facet, PageEvent, Part, Tallies } from "./types" */

const MOST_CHIPS = 8; // of a facet; more values become a menu

export function drawFilters() {
  const chips = (/** @type {Facet} */ facet, /** @type {string[][]} */ values) =>
    h(
      "div",
      { class: "chips", "data-facet": facet },
      values.map(([value, label, title]) => chip(facet, value, label, title)),
    );
  const present = (/** @type {Facet} */ facet) =>
    new Set(
      browser.problems.flatMap((problem) =>
        problem.samples.flatMap((sample) => FACETS[facet].of(sample, problem)),
      ),
    );
  const [verdicts, traits] = [present("verdict"), present("only")];
  const order = (/** @type {PageEvent} */ event) => {
    browser.settings.order = event.target.value;
    browser.open = null; // begin with the first
    changed();
  };
  byId("filters").replaceChildren(
    h(
      "div",
      { class: "bar" },
      EVALUATION.benchmarks.length > 1 &&
        facet(
          "benchmark",
          EVALUATION.benchmarks.map(({ name, title }) => [name, title]),
          chips,
        ),
      chips(
        "verdict",
        Object.entries(OUTCOMES)
          .filter(([verdict]) => verdicts.has(verdict))
          .map(([verdict, [, label, title]]) => [verdict, label, title]),
      ),
      traits.size > 0 &&
        chips(
          "only",
          Object.entries(TRAITS)
            .filter(([trait]) => traits.has(trait))
            .map(([trait, [label, title]]) => [trait, label, title]),
        ),
      sourceValues().length > 1 && facet("source", sourceValues(), chips),
      h("input", {
        type: "search",
        id: "search",
        placeholder: "search …",
        title: "in questions, answers, responses and the judge's words; press /",
        "aria-label": "search",
        oninput: later(typed, 120),
      }),
      h("button", { class: "link", id: "clear", onclick: clearFilters }, "clear filters"),
    ),
  );
  byId("list-head").replaceChildren(
    h("span", { id: "tally", role: "status" }),
    h(
      "select",
      { id: "order", "aria-label": "order", onchange: order },
      Object.entries(ORDERS).map(([value, [text]]) => h("option", { value }, text)),
    ),
  );
}

// The data sources, unless they say no more than the benchmarks do.
function sourceValues() {
  const sources = EVALUATION.benchmarks.map(
    (_, at) =>
      new Set(
        browser.problems
          .filter(({ benchmark }) => benchmark === at)
          .map(({ source }) => source ?? ""),
      ),
  );
  if (sources.every((values) => values.size < 2)) return [];
  return [...new Set(sources.flatMap((values) => [...values]))]
    .sort()
    .map((source) => [source, source || "no source"]);
}

/**
 * @param {Facet} name
 * @param {string[][]} values
 * @param {(facet: Facet, values: string[][]) => Part} chips
 */
function facet(name, values, chips) {
  if (values.length <= MOST_CHIPS) return chips(name, values);
  const choose = (/** @type {PageEvent} */ event) => {
    browser.settings[name] = new Set(event.target.value ? [event.target.value] : []);
    changed();
  };
  const all = h("option", { value: "" }, `all ${count(values.length)} ${name}s`);
  return h(
    "select",
    { id: `choose-${name}`, "aria-label": name, onchange: choose },
    all,
    values.map(([value, label]) => h("option", { value }, label)),
  );
}

/**
 * @param {Facet} facet
 * @param {string} value
 * @param {string} label
 * @param {string} [title]
 */
function chip(facet, value, label, title) {
  const choose = () => {
    const chosen = browser.settings[facet];
    if (!chosen.delete(value)) chosen.add(value);
    changed();
  };
  const mark = facet === "verdict" && h("i", { class: `mark ${value}` });
  const node = h(
    "button",
    { class: "chip", "aria-pressed": "false", title: title || null, onclick: choose },
    mark,
    label,
    h("small", {}),
  );
  node.dataset.value = value;
  return node;
}

/**
 * Does it once there was no other call for a while.
 * @param {(event: PageEvent) => void} action
 * @param {number} wait milliseconds
 */
function later(action, wait) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  return (/** @type {PageEvent} */ event) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(event), wait);
  };
}

/** @param {PageEvent} event */
function typed(event) {
  browser.settings.search = event.target.value;
  changed();
}

function clearFilters() {
  Object.assign(browser.settings, {
    benchmark: new Set(),
    verdict: new Set(),
    only: new Set(),
    source: new Set(),
    search: "",
  });
  showSettings();
  changed();
}

// The controls as the settings say.
export function showSettings() {
  byId("search").value = browser.settings.search;
  byId("order").value = browser.settings.order;
  for (const name of facetNames())
    if (byId(`choose-${name}`)) byId(`choose-${name}`).value = [...browser.settings[name]][0] ?? "";
}

// The reader chose something else: the problem shown must be one of those listed.
async function changed() {
  browser.sample = null;
  await browse(true);
}

/**
 * Which problems, and which of their samples, pass the filters; the counts beside them say what one
 * more choice would leave.
 * @param {boolean} mustList
 */
export async function browse(mustList = false) {
  const drawing = ++browser.drawing;
  const { settings } = browser;
  const text = settings.search.trim().toLowerCase();
  if (text) await Promise.all(browser.problems.map(makeSearchable));
  if (drawing !== browser.drawing) return; // overtaken by a newer choice
  const tallies = noTallies();
  browser.matches = [];
  for (const problem of browser.problems) {
    const found = !text || problem.searchable?.includes(text);
    /** @type {number[]} */
    const shown = [];
    problem.samples.forEach((sample, at) => {
      const says = found || sample.searchable?.includes(text);
      if (says && passes(sample, problem, FACETS, settings, tallies)) shown.push(at);
    });
    if (shown.length) browser.matches.push({ problem, shown });
  }
  const compare = ORDERS[settings.order][1];
  if (compare) browser.matches.sort((a, b) => compare(a.problem, b.problem));
  const listed = browser.matches.some(({ problem }) => problem === browser.open);
  if (!browser.open || (mustList && !listed)) browser.open = browser.matches[0]?.problem ?? null;
  drawTallies(tallies);
  drawRows();
  scrollToRow();
  if (mustList) writeAddress();
  await drawProblem();
}

/** @param {EvaluatedProblem} problem */
async function makeSearchable(problem) {
  if (problem.searchable !== undefined) return;
  const texts = await textsOf(problem);
  problem.samples.forEach((sample, at) => {
    const { response = [], reply = "" } = texts[at];
    sample.searchable = [...response, sample.prediction, sample.reason, reply]
      .join("\n")
      .toLowerCase();
  });
  problem.searchable = [problem.id, problem.source, problem.question, ...problem.golds]
    .join("\n")
    .toLowerCase();
}

/** @param {Tallies} tallies */
function drawTallies(tallies) {
  const { settings } = browser;
  for (const node of parts(document, ".chip")) {
    const facet = /** @type {Facet} */ (node.parentElement?.dataset.facet);
    const value = node.dataset.value ?? "";
    node.setAttribute("aria-pressed", String(settings[facet].has(value)));
    const left = tallies[facet].get(value) || 0;
    part(node, "small").textContent = count(left);
    node.classList.toggle("none", !left);
  }
  const numSamples = sum(browser.matches.map(({ shown }) => shown.length));
  byId("tally").textContent =
    `${plural(browser.matches.length, "problem")}, ${plural(numSamples, "response")}`;
  byId("clear").hidden = !settings.search && facetNames().every((facet) => !settings[facet].size);
}

/** @param {PageEvent} event */
export function turnByKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || byId("lightbox").open) return;
  if (event.key === "Escape" && event.target === byId("search")) event.target.blur();
  if (event.target.closest?.("input, select, textarea")) return;
  if (event.key === "/") {
    byId("search").focus();
    event.preventDefault();
  }
  if (["ArrowRight", "j"].includes(event.key)) turn(1);
  if (["ArrowLeft", "k"].includes(event.key)) turn(-1);
}
