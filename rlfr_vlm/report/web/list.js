// The list of problems. Only the rows in sight are in the document.

import { verdictBar } from "./benchmarks.js";
import { byId, h, parts } from "./dom.js";
import { EVALUATION } from "./evaluation_data.js";
import { address, browser } from "./evaluation_store.js";

/** @import { EvaluatedProblem, Part } from "./types" */

const ROW = 78; // pixels, as in evaluation.css

const MOST_MARKS = 10; // samples shown one by one in a row

export function startList() {
  const redraw = () => requestAnimationFrame(() => drawRows(true));
  byId("list-body").addEventListener("scroll", redraw, { passive: true });
  window.addEventListener("scroll", redraw, { passive: true });
  window.addEventListener("resize", redraw);
  const measure = () =>
    document.documentElement.style.setProperty("--toolbar", `${byId("filters").offsetHeight}px`);
  measure();
  new ResizeObserver(measure).observe(byId("filters"));
}

/**
 * Rows from the first to the last in sight, and a few around them. `same`: only the scroll position
 * has changed.
 * @param {boolean} same
 */
export function drawRows(same = false) {
  const rows = byId("rows");
  rows.style.height = `${Math.max(1, browser.matches.length) * ROW}px`;
  if (!browser.matches.length) {
    rows.replaceChildren(h("p", { class: "empty" }, "No response fits these filters."));
    return;
  }
  const [box, frame] = [rows.getBoundingClientRect(), byId("list-body").getBoundingClientRect()];
  const first = Math.max(0, Math.floor((Math.max(0, frame.top) - box.top) / ROW) - 4);
  const last = Math.min(
    browser.matches.length,
    Math.ceil((Math.min(innerHeight, frame.bottom) - box.top) / ROW) + 4,
  );
  const focused = /** @type {Part | null} */ (document.activeElement)?.closest("#rows a")?.dataset
    .at;
  /** @type {Map<number, Part>} */
  const kept = new Map(
    same ? parts(rows, ":scope > *").map((node) => [Number(node.dataset.at), node]) : [],
  );
  rows.replaceChildren(
    ...browser.matches
      .slice(first, last)
      .map(({ problem }, at) => kept.get(first + at) ?? row(problem, first + at)),
  );
  if (focused) rows.querySelector(`[data-at="${focused}"]`)?.focus({ preventScroll: true });
}

/**
 * @param {EvaluatedProblem} problem
 * @param {number} at
 */
function row(problem, at) {
  const picture = problem.images.find(({ key }) => key);
  const node = h(
    "a",
    {
      class: "row",
      href: address(problem),
      "data-at": at,
      "aria-current": problem === browser.open ? "true" : null,
    },
    picture && h("img", { src: byId(`picture-${picture.key}`).textContent, alt: "" }),
    h(
      "span",
      { class: "what" },
      h(
        "span",
        { class: "name" },
        problem.id,
        EVALUATION.benchmarks.length > 1 && ` · ${EVALUATION.benchmarks[problem.benchmark].title}`,
      ),
      h(
        "span",
        { class: "snippet" },
        problem.question.replaceAll("<image>", " ").replace(/\s+/g, " ").trim().slice(0, 140) ||
          "(no question)",
      ),
    ),
    h("span", { class: "score" }, shareText(problem), marks(problem)),
  );
  node.style.top = `${at * ROW}px`;
  return node;
}

/**
 * Right of counted, and how many are not counted.
 * @param {EvaluatedProblem} problem
 */
function shareText({ right, counted, samples }) {
  const left = samples.length - counted;
  return h(
    "b",
    { title: `${right} of ${counted} right${left ? `, ${left} not counted` : ""}` },
    counted ? `${right}/${counted}` : "–",
    left > 0 && h("small", {}, ` +${left}?`),
  );
}

/** @param {EvaluatedProblem} problem */
export function marks(problem) {
  if (problem.samples.length <= MOST_MARKS) {
    return h(
      "span",
      { class: "marks", "aria-hidden": "true" },
      problem.samples.map(({ verdict }) => h("i", { class: verdict })),
    );
  }
  /** @type {Record<string, number>} */
  const counts = {};
  for (const { verdict } of problem.samples) counts[verdict] = (counts[verdict] || 0) + 1;
  return verdictBar({ counts });
}

export const openAt = () => browser.matches.findIndex(({ problem }) => problem === browser.open);

export function scrollToRow() {
  const at = openAt();
  const list = byId("list-body");
  if (at < 0 || list.scrollHeight <= list.clientHeight) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight)
    list.scrollTop = (at + 1) * ROW - list.clientHeight;
}
