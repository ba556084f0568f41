// The table of benchmarks.

import { h } from "./dom.js";
import { bounds, count, isNumber, percent, sum } from "./format.js";

/** @import { BenchmarkData } from "./data" */
/** @import { Child, Column } from "./types" */

/**
 * What can become of a response: sign, label, explanation. Only the first two are counted in an
 * accuracy.
 * @type {Record<string, [string, string, string]>}
 */
export const OUTCOMES = {
  correct: ["✓", "correct", ""],
  wrong: ["✗", "wrong", ""],
  unjudged: ["?", "unjudged", "rules could not decide and there was nobody to ask"],
  failed: ["!", "failed", "the judge did not answer; asked again when the evaluation is resumed"],
  error: ["!", "error", "the grader could not read the answer within its limits"],
  pending: ["…", "not graded yet", "a response without a verdict"],
  unanswered: ["…", "no response yet", ""],
};

const UNCOUNTED = Object.keys(OUTCOMES).slice(2);

/**
 * Headline numbers, an accuracy never without what it leaves out. `link` makes the cell of a
 * benchmark's name.
 * @param {BenchmarkData[]} benchmarks
 * @param {(benchmark: BenchmarkData) => Child} link
 */
export function benchmarkTable(benchmarks, link) {
  const some = (/** @type {(benchmark: BenchmarkData) => unknown} */ value) =>
    benchmarks.some(value);
  const ks = new Set(benchmarks.map(({ passAt }) => passAt?.[0]).filter(isNumber));
  const k = ks.size === 1 ? [...ks][0] : "k";
  const agreement = (/** @type {BenchmarkData} */ { agreement: [same, both] }) =>
    both ? same / both : null;
  const answered = (/** @type {BenchmarkData} */ { counts }) =>
    sum(Object.values(counts)) - counts.unanswered;
  /** @type {(false | Column<BenchmarkData>)[]} */
  const possible = [
    ["Benchmark", "name", link],
    ["", "wide", verdictBar],
    ["Accuracy", "num strong", accuracyCell],
    ["95 % interval", "num", ({ accuracy }) => (accuracy ? bounds(accuracy) : "–")],
    ["Not counted", "num", uncountedCell],
    some(({ passAt }) => isNumber(passAt?.[1])) && [
      `pass@${k}`,
      "num",
      ({ passAt }) => (passAt ? percent(passAt[1]) : "–"),
    ],
    some(({ majority }) => isNumber(majority)) && [
      `maj@${k}`,
      "num",
      ({ majority }) => percent(majority),
    ],
    some(({ greedy }) => isNumber(greedy)) && ["Greedy", "num", ({ greedy }) => percent(greedy)],
    [
      "Truncated",
      "num",
      (benchmark) =>
        answered(benchmark) ? percent(benchmark.truncated / answered(benchmark)) : "–",
    ],
    [
      "Mean length",
      "num",
      ({ meanLength }) => (isNumber(meanLength) ? `${count(Math.round(meanLength))} tokens` : "–"),
    ],
    some((benchmark) => isNumber(agreement(benchmark))) && [
      "Rule = judge",
      "num",
      (benchmark) => percent(agreement(benchmark)),
    ],
  ];
  const columns = possible.filter((column) => column !== false);
  return h(
    "table",
    { class: "benchmarks" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        columns.map(([title, kind]) => h("th", { class: kind }, title)),
      ),
    ),
    h(
      "tbody",
      {},
      benchmarks.map((benchmark) =>
        h(
          "tr",
          {},
          columns.map(([title, kind, cell]) =>
            h("td", { class: kind, "data-title": title || null }, cell(benchmark)),
          ),
        ),
      ),
    ),
  );
}

/** @param {BenchmarkData} benchmark */
function accuracyCell({ accuracy, provisional, withheld }) {
  if (withheld)
    return h("span", { class: "cut", title: "too many responses have no verdict" }, "no score");
  if (!accuracy) return "–";
  return [
    percent(accuracy.value),
    provisional &&
      h("small", { title: "counted from the ledger; the evaluation has not ended" }, " so far"),
  ];
}

/** @param {BenchmarkData} benchmark */
function uncountedCell({ counts }) {
  const left = sum(UNCOUNTED.map((verdict) => counts[verdict]));
  if (!left) return "0";
  const parts = UNCOUNTED.filter((verdict) => counts[verdict]).map(
    (verdict) => `${count(counts[verdict])} ${OUTCOMES[verdict][1]}`,
  );
  return [
    h("b", { class: "cut" }, count(left)),
    ` of ${count(sum(Object.values(counts)))}`,
    h("small", {}, parts.join(", ")),
  ];
}

/**
 * The shares of all verdicts as one line.
 * @param {{ counts: Record<string, number> }} benchmark
 */
export function verdictBar({ counts }) {
  const bar = h("div", { class: "verdicts" });
  for (const [verdict, [, label]] of Object.entries(OUTCOMES)) {
    if (!counts[verdict]) continue;
    const part = h("i", { class: verdict, title: `${count(counts[verdict])} ${label}` });
    part.style.flexGrow = String(counts[verdict]);
    bar.append(part);
  }
  return bar;
}
