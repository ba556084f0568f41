// Which problems, and which of their samples, pass the filters of an evaluation.

/** @import { ProblemData, SampleData } from "./data" */
/** @import { Chosen, EvaluatedProblem, Facet, Facets, Order, Sample, Tallies } from "./types" */

/**
 * What samples are filtered by: the values that a sample has. Any of the chosen values will do, or,
 * with `every`, it takes all of them.
 * @param {{ name: string }[]} benchmarks
 * @returns {Facets}
 */
export function facetsOf(benchmarks) {
  return {
    benchmark: { of: (_, problem) => [benchmarks[problem.benchmark].name] },
    verdict: { of: (sample) => [sample.verdict] },
    only: { of: (sample) => sample.traits, every: true },
    source: { of: (_, problem) => [problem.source ?? ""] },
  };
}

/** @returns {Facet[]} */
export const facetNames = () => ["benchmark", "verdict", "only", "source"];

/** @type {Record<string, [string, string]>} */
export const TRAITS = {
  truncated: ["truncated", "cut at the token limit"],
  disagreement: ["rule ≠ judge", "rule and judge decided differently"],
  unread: ["no answer found", "no answer could be extracted"],
};

/** @type {Record<string, [string, Order | null]>} */
export const ORDERS = {
  file: ["in order", null],
  hardest: ["least right first", (a, b) => share(a) - share(b)],
  easiest: ["most right first", (a, b) => share(b) - share(a)],
  longest: ["longest first", (a, b) => longest(b) - longest(a)],
};

/** @param {EvaluatedProblem} problem */
const share = ({ right, counted }) => (counted ? right / counted : -0.5);

/** @param {EvaluatedProblem} problem */
const longest = ({ samples }) => Math.max(0, ...samples.map(({ tokens }) => tokens ?? 0));

/**
 * A problem with what the filters ask of it and of each sample, found once.
 * @param {ProblemData} problem
 * @returns {EvaluatedProblem}
 */
export function prepared(problem) {
  const samples = problem.samples.map(withTraits);
  return {
    ...problem,
    samples,
    right: samples.filter(({ verdict }) => verdict === "correct").length,
    counted: samples.filter(({ verdict }) => isDecided(verdict)).length,
  };
}

/** Whether a verdict is counted in an accuracy. */
const isDecided = (/** @type {string | undefined} */ verdict) =>
  verdict === "correct" || verdict === "wrong";

/**
 * @param {SampleData} sample
 * @returns {Sample}
 */
function withTraits(sample) {
  const judged = sample.judge?.verdict;
  const disagreement = isDecided(sample.rule) && isDecided(judged) && sample.rule !== judged;
  const answered = sample.verdict !== "unanswered" && sample.verdict !== "pending";
  const traits = [
    ...(sample.finish === "length" ? ["truncated"] : []),
    ...(disagreement ? ["disagreement"] : []),
    ...(answered && !sample.prediction ? ["unread"] : []),
  ];
  return { ...sample, disagreement, traits };
}

/** @returns {Tallies} */
export function noTallies() {
  return { benchmark: new Map(), verdict: new Map(), only: new Map(), source: new Map() };
}

/**
 * Whether a sample passes all filters; counts it for every choice that it would pass.
 * @param {Sample} sample
 * @param {EvaluatedProblem} problem
 * @param {Facets} facets
 * @param {Chosen} chosen
 * @param {Tallies} tallies
 */
export function passes(sample, problem, facets, chosen, tallies) {
  /** @type {Facet[]} */
  const failing = [];
  for (const name of facetNames()) {
    const { of, every } = facets[name];
    const wanted = [...chosen[name]];
    const values = of(sample, problem);
    const has = (/** @type {string} */ value) => values.includes(value);
    if (wanted.length && !(every ? wanted.every(has) : wanted.some(has))) failing.push(name);
  }
  const counted = failing.length === 0 ? facetNames() : failing.length === 1 ? failing : [];
  for (const name of counted) {
    if (failing.length && facets[name].every) continue;
    for (const value of facets[name].of(sample, problem))
      tallies[name].set(value, (tallies[name].get(value) || 0) + 1);
  }
  return failing.length === 0;
}
