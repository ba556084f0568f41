// The problems of the page, what is chosen of them, and the address that says so.

import { EVALUATION } from "./evaluation_data.js";
import { ORDERS, facetNames, facetsOf } from "./filters.js";
import { unpack } from "./unpack.js";

/** @import { SampleTexts } from "./data" */
/** @import { Chosen, EvaluatedProblem, ProblemMatch } from "./types" */

export const FACETS = facetsOf(EVALUATION.benchmarks);

/**
 * @type {{
 *   problems: EvaluatedProblem[],
 *   chunks: Map<number, Promise<SampleTexts[][]>>,
 *   matches: ProblemMatch[],
 *   open: EvaluatedProblem | null,
 *   sample: number | null,
 *   drawing: number,
 *   settings: Chosen & { search: string, order: string },
 * }}
 */
export const browser = {
  problems: [],
  chunks: new Map(), // number -> a promise of the texts of its problems
  matches: [], // {problem, shown: places of the samples that pass}
  open: null, // the problem shown
  sample: null, // the sample that the address names
  drawing: 0,
  settings: {
    benchmark: new Set(),
    verdict: new Set(),
    only: new Set(),
    source: new Set(),
    search: "",
    order: "file",
  },
};

/**
 * The texts of a problem's samples.
 * @param {EvaluatedProblem} problem
 */
export async function textsOf(problem) {
  const known = browser.chunks.get(problem.chunk) ?? unpack(`responses-${problem.chunk}`);
  browser.chunks.set(problem.chunk, known);
  return (await known)[problem.at];
}

/**
 * The address: #benchmark/problem?verdict=wrong&only=truncated&sample=2
 * @param {EvaluatedProblem | null} problem
 * @param {number} [sample]
 */
export function address(problem, sample) {
  const { settings } = browser;
  const parameters = new URLSearchParams();
  for (const facet of facetNames())
    for (const value of settings[facet]) parameters.append(facet, value);
  if (settings.search.trim()) parameters.set("search", settings.search.trim());
  if (settings.order !== "file") parameters.set("order", settings.order);
  if (sample !== undefined) parameters.set("sample", String(sample));
  const names = problem ? [EVALUATION.benchmarks[problem.benchmark].name, problem.id] : [];
  const place = names.map(encodeURIComponent).join("/");
  const text = parameters.toString();
  return `#${place}${text ? `?${text}` : ""}`;
}

export function readAddress() {
  const [place, text] = location.hash.slice(1).split("?");
  const parameters = new URLSearchParams(text || "");
  const { settings } = browser;
  for (const facet of facetNames()) settings[facet] = new Set(parameters.getAll(facet));
  settings.search = parameters.get("search") || "";
  const order = parameters.get("order") ?? "file";
  settings.order = Object.hasOwn(ORDERS, order) ? order : "file";
  browser.sample = parameters.has("sample") ? Number(parameters.get("sample")) : null;
  try {
    const [benchmark, id] = place.split("/").map(decodeURIComponent);
    return (
      browser.problems.find(
        (problem) =>
          problem.id === id && EVALUATION.benchmarks[problem.benchmark].name === benchmark,
      ) || null
    );
  } catch {
    return null; // no address of ours
  }
}

export function writeAddress() {
  history.replaceState(null, "", address(browser.open));
}
