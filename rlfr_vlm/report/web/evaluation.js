// The page of an evaluation: its numbers, and the start.

import { benchmarkTable } from "./benchmarks.js";
import { byId, h, part, visible } from "./dom.js";
import { EVALUATION } from "./evaluation_data.js";
import { browser, readAddress } from "./evaluation_store.js";
import { prepared } from "./filters.js";
import { count, plural, sum } from "./format.js";
import { startList } from "./list.js";
import { browse, drawFilters, showSettings, turnByKey } from "./problems.js";
import { problemPanel } from "./shared.js";
import { CAN_UNPACK, unpack } from "./unpack.js";

/** @import { BenchmarkData } from "./data" */
/** @import { Child, PageEvent } from "./types" */

async function followAddress() {
  const problem = readAddress();
  browser.open = problem;
  document.body.toggleAttribute("data-reading", problem !== null);
  showSettings();
  await browse();
}

function showNumbers() {
  const { benchmarks } = EVALUATION;
  const missing = sum(benchmarks.map(({ counts }) => counts.pending + counts.unanswered));
  const total = sum(benchmarks.map(({ counts }) => sum(Object.values(counts))));
  byId("model-name").append(visible(EVALUATION.name));
  byId("model-kind").append(visible(EVALUATION.model));
  byId("evaluation-state").textContent = missing
    ? `${count(total - missing)} of ${count(total)} responses graded`
    : `${count(total)} responses`;
  byId("evaluation-state").dataset.state = missing ? "open" : "";
  byId("foot").textContent =
    `Page written ${EVALUATION.writtenAt}. Keys: ← → or j k for the previous and next problem, ` +
    "/ to search.";
  const nameCell = (/** @type {BenchmarkData} */ { title, numProblems, numSamples }) => [
    h("b", {}, title),
    h("small", {}, `${plural(numProblems, "problem")}${numSamples > 1 ? ` × ${numSamples}` : ""}`),
  ];
  byId("numbers").append(
    problemPanel(EVALUATION, "Not in this folder: ") || "",
    h("div", { class: "card" }, benchmarkTable(benchmarks, nameCell), protocolPanel(benchmarks)),
  );
}

/**
 * Settings by row, benchmarks by column; what all of them share is said once.
 * @param {BenchmarkData[]} benchmarks
 */
function protocolPanel(benchmarks) {
  const rows = (/** @type {"protocol" | "summary"} */ part) => {
    const tables = benchmarks.map((benchmark) => new Map(benchmark[part]));
    return [...new Set(tables.flatMap((table) => [...table.keys()]))].map((key) => {
      const values = tables.map((table) => table.get(key) ?? "–");
      const same = values.every((value) => value === values[0]);
      const cells = same
        ? [h("td", { colspan: values.length }, values[0])]
        : values.map((value) => h("td", {}, value));
      return h("tr", {}, h("td", {}, key), cells);
    });
  };
  const heading = (/** @type {string} */ text, /** @type {Child[]} */ cells) =>
    h("tr", {}, h("th", {}, text), cells);
  const summary = rows("summary");
  return h(
    "details",
    { id: "protocol" },
    h(
      "summary",
      {},
      "Protocol ",
      benchmarks.map(({ hash, title }, at) => [
        at ? " " : "",
        h("span", { class: "hash", title: `protocol of ${title}` }, hash || "unknown"),
      ]),
    ),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          heading(
            "",
            benchmarks.map(({ title }) => h("th", {}, title)),
          ),
        ),
        h("tbody", {}, rows("protocol")),
        summary.length > 0 &&
          h(
            "tbody",
            {},
            heading("also in summary.json", [h("th", { colspan: benchmarks.length })]),
            summary,
          ),
      ),
    ),
  );
}

async function start() {
  showNumbers();
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  if (!CAN_UNPACK) {
    byId("foot").before(
      h(
        "p",
        { class: "empty" },
        "This browser cannot unpack the responses: use one of 2023 or later.",
      ),
    );
    return;
  }
  browser.problems = (await unpack("problem-index")).map(prepared);
  if (!browser.problems.length) {
    byId("foot").before(
      h(
        "p",
        { class: "empty" },
        "No problems yet: problems.jsonl and ledger.jsonl are missing or empty.",
      ),
    );
    return;
  }
  byId("filters").hidden = part(document, ".panes").hidden = false;
  drawFilters();
  startList();
  document.addEventListener("keydown", (event) => turnByKey(/** @type {PageEvent} */ (event)));
  window.addEventListener("hashchange", followAddress);
  await followAddress();
}

document.addEventListener("DOMContentLoaded", start);
