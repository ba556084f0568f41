// The overview: what the run reached, its evaluations, its checkpoints, its config and what its
// folder lacks.

import { benchmarkTable } from "./benchmarks.js";
import { byId, h } from "./dom.js";
import { eventPanel } from "./events.js";
import { bounds, count, duration, isNumber, median, percent, plural, points } from "./format.js";
import { groupCard } from "./group.js";
import { QUANTITIES, browser, rolloutGroups, stepTokens } from "./rollout_store.js";
import { ACCURACY, chartKey, isDrawable, runCharts } from "./run_charts.js";
import { RUN } from "./run_data.js";
import { legend } from "./shading.js";
import { problemPanel } from "./shared.js";
import { CAN_UNPACK } from "./unpack.js";

/** @import { Evaluation, OverviewData } from "./data" */
/** @import { Child } from "./types" */

export function showOverview() {
  const run = RUN.overview;
  byId("overview").append(
    ...[
      problemPanel(run, "Not in this run: "),
      eventPanel(false),
      tiles(run),
      h("div", { class: "columns" }, accuracyPanel(), evaluationPanel(run)),
      benchmarkPanel(run),
      sourcePanel(run.evaluations),
      RUN.rollouts.numResponses > 0 && CAN_UNPACK && h("div", { id: "sample" }),
      h("div", { class: "columns even" }, configPanel(run), environmentPanel(run)),
      h(
        "p",
        { class: "foot" },
        `Report written ${run.writtenAt}`,
        run.lastMetricsAt && `; last metrics ${run.lastMetricsAt}`,
        ".",
      ),
    ].filter((panel) => panel !== null && panel !== false),
  );
  const chart = byId("overview-accuracy");
  if (chart) runCharts.draw(chart, ACCURACY, 300);
  if (byId("sample")) showSample();
}

/** @param {OverviewData} run */
function tiles(run) {
  const [first, last] = [run.evaluations[0], run.evaluations.at(-1)];
  const speed = median(RUN.curves.metrics.series["perf/tokens_per_s"] || []);
  const step = median(RUN.curves.metrics.series["timing_s/step"] || []);
  const best = run.evaluations.find((evaluation) => evaluation.step === run.best);
  return h(
    "div",
    { class: "tiles" },
    accuracyTile("Held-out accuracy, sampled", first, last, "accuracy"),
    accuracyTile("Held-out accuracy, greedy", first, last, "greedy"),
    tile(
      "Steps",
      run.numSteps === null
        ? "–"
        : [
            count(run.numSteps),
            run.plannedSteps && h("small", {}, ` of ${count(run.plannedSteps)}`),
          ],
      run.seconds === null ? "no timing yet" : `${duration(run.seconds)} of training`,
    ),
    tile(
      "Speed",
      speed === null ? "–" : [count(Math.round(speed)), h("small", {}, " tokens/s")],
      step === null ? "no timing yet" : `median; a step takes ${duration(step)}`,
    ),
    tile("Best checkpoint", best ? `step ${best.step}` : "–", checkpointLine(run, best)),
  );
}

/**
 * @param {string} label
 * @param {Child} value
 * @param {Child} detail
 */
function tile(label, value, detail) {
  return h(
    "div",
    { class: "tile" },
    h("h3", {}, label),
    h("p", { class: "value" }, value),
    h("p", { class: "detail" }, detail),
  );
}

/**
 * @param {string} label
 * @param {Evaluation | undefined} first
 * @param {Evaluation | undefined} last
 * @param {"accuracy" | "greedy"} key
 */
function accuracyTile(label, first, last, key) {
  const [from, to] = [first?.[key], last?.[key]];
  if (!first || !last || !isNumber(to)) return tile(label, "–", "not evaluated yet");
  if (first === last || !isNumber(from))
    return tile(label, percent(to), `one evaluation, at step ${last.step}`);
  const detail = [
    change(from, to, " points"),
    first.step > 0 && ` since step ${first.step}`,
    key === "accuracy" && isNumber(last.low) && ` · 95 %: ${bounds(last)}`,
  ];
  return tile(
    label,
    [
      h("span", { class: "before" }, percent(from)),
      h("span", { class: "arrow" }, " → "),
      percent(to),
    ],
    detail,
  );
}

/**
 * From one share to another, in percentage points.
 * @param {number} from
 * @param {number} to
 * @param {string} unit
 */
function change(from, to, unit = "") {
  return h(
    "span",
    { class: `change ${to > from ? "up" : to < from ? "down" : ""}` },
    points(to - from) + unit,
  );
}

/**
 * @param {OverviewData} run
 * @param {Evaluation | undefined} best
 */
function checkpointLine(run, best) {
  const latest = run.latestCheckpoint
    ? `latest: ${run.latestCheckpoint.replace(/^global_/, "").replace("_", " ")}`
    : "";
  if (best) return [`accuracy ${percent(best.accuracy)}`, latest && ` · ${latest}`];
  if (!run.checkpoints.length) return "no checkpoint yet";
  return ["no kept checkpoint was evaluated", latest && ` · ${latest}`];
}

function accuracyPanel() {
  const drawable = isDrawable(ACCURACY);
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "Accuracy"),
    chartKey(ACCURACY),
    drawable
      ? h("div", { id: "overview-accuracy", class: "plot" })
      : h("p", { class: "empty" }, "No accuracy to show yet."),
  );
}

/** @param {OverviewData} run */
function evaluationPanel(run) {
  const rows = run.evaluations;
  const card = h("div", { class: "card" }, h("h2", {}, "Evaluations"));
  if (!rows.length) {
    card.append(h("p", { class: "empty" }, "No evaluation to show yet."));
    return card;
  }
  const label = (/** @type {Evaluation} */ row, /** @type {number} */ at) => [
    row.step === 0 ? "before" : at === rows.length - 1 && run.state === "finished" ? "after" : "",
    row.step === run.best ? "best kept" : "",
  ];
  card.append(
    h("p", { class: "chart-key" }, [...new Set(rows.map(evaluationSize))].join("; ")),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { id: "evaluations" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Step", "", "Sampled", "95 % interval", "Greedy"].map((name, at) =>
              h("th", { class: at === 1 ? "" : "num" }, name),
            ),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row, at) =>
            h(
              "tr",
              { class: at === 0 || at === rows.length - 1 ? "edge" : "" },
              h("td", { class: "num" }, row.step),
              h(
                "td",
                {},
                label(row, at)
                  .filter(Boolean)
                  .map((text) => h("span", { class: "tag" }, text)),
              ),
              h("td", { class: "num strong" }, percent(row.accuracy)),
              h("td", { class: "num" }, isNumber(row.low) ? bounds(row) : "–"),
              h("td", { class: "num" }, percent(row.greedy)),
            ),
          ),
        ),
      ),
    ),
  );
  return card;
}

/** @param {Evaluation} row */
function evaluationSize(row) {
  const samples = row.num_samples ? `, ${plural(row.num_samples, "sampled response")} each` : "";
  return isNumber(row.num_problems)
    ? `${plural(row.num_problems, "held-out problem")}${samples}`
    : "";
}

/** @param {Evaluation[]} evaluations */
function sourcePanel(evaluations) {
  const last = evaluations.at(-1);
  if (!last || last.by_source.length < 2) return null;
  const first = evaluations.length > 1 ? evaluations[0] : null;
  const before = new Map(first?.by_source.map((source) => [source.name, source]));
  const titles = [
    "Kind",
    "",
    first ? `Step ${first.step}` : "–",
    `Step ${last.step}`,
    "Change",
    "Problems",
  ];
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "By kind of problem"),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { id: "sources" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            titles.map((name, at) => h("th", { class: at < 2 ? "" : "num" }, name)),
          ),
        ),
        h(
          "tbody",
          {},
          last.by_source.map((source) => {
            const [from, to] = [before.get(source.name)?.accuracy, source.accuracy];
            return h(
              "tr",
              {},
              h("td", {}, source.name),
              h("td", { class: "wide" }, dumbbell(from, to)),
              h("td", { class: "num" }, percent(from)),
              h("td", { class: "num strong" }, percent(to)),
              h("td", { class: "num" }, isNumber(from) && isNumber(to) ? change(from, to) : "–"),
              h(
                "td",
                { class: "num" },
                isNumber(source.num_problems) ? count(source.num_problems) : "–",
              ),
            );
          }),
        ),
      ),
    ),
  );
}

/**
 * What the benchmarks below this run say; their page lies beside this one.
 * @param {OverviewData} run
 */
function benchmarkPanel({ benchmarks, benchmarkPage }) {
  if (!benchmarks.length) return null;
  return h(
    "div",
    { class: "card", id: "benchmarks" },
    h(
      "div",
      { class: "bar" },
      h("h2", {}, "Benchmarks"),
      h("span", { class: "gap" }),
      h("a", { href: benchmarkPage }, "problems and responses ›"),
    ),
    h(
      "div",
      { class: "scroll" },
      benchmarkTable(benchmarks, ({ title }) => title),
    ),
  );
}

/**
 * Before and after on one line from 0 to 100 %.
 * @param {number | null | undefined} from
 * @param {number | null | undefined} to
 */
function dumbbell(from, to) {
  const line = h("div", { class: "dumbbell" });
  /**
   * @param {string} name
   * @param {number} left
   * @param {number} [width]
   */
  const place = (name, left, width) => {
    const mark = h("i", { class: name });
    mark.style.left = `${100 * left}%`;
    if (width !== undefined) mark.style.width = `${100 * width}%`;
    line.append(mark);
  };
  if (isNumber(from) && isNumber(to))
    place(to >= from ? "bar up" : "bar down", Math.min(from, to), Math.abs(to - from));
  if (isNumber(from)) place("dot from", from);
  if (isNumber(to)) place("dot to", to);
  return line;
}

// One group of the last step in which siblings disagree, a right and a wrong response beside each
// other.
async function showSample() {
  const groups = await rolloutGroups();
  const group =
    groups.findLast(({ right, responses }) => right > 0 && right < responses.length) ||
    groups[groups.length - 1];
  const tokens = (await stepTokens(group.step))[group.at];
  const pick = (/** @type {boolean} */ wanted) =>
    group.responses.findIndex((response) => (response.verdict === "correct") === wanted);
  byId("sample").append(
    h(
      "div",
      { class: "bar" },
      h("h2", {}, "A look at the rollouts"),
      browser.settings.shade && [
        h(
          "span",
          { class: "hint" },
          `tokens shaded by ${QUANTITIES[browser.settings.shade].label}`,
        ),
        legend(browser.settings.shade),
      ],
      h("span", { class: "gap" }),
      h(
        "button",
        { class: "link", onclick: () => byId("tab-rollouts").click() },
        `browse all ${count(RUN.rollouts.numResponses)} ›`,
      ),
    ),
    groupCard(
      group,
      [pick(true), pick(false)].filter((at) => at >= 0),
      tokens,
    ),
  );
}

/** @param {OverviewData} run */
function configPanel(run) {
  if (!run.config) return null;
  const lines = run.config
    .trimEnd()
    .split("\n")
    .map((line) => {
      const key = line.match(/^(\s*(?:- )?[\w.-]+:)(.*)$/s);
      return key ? [h("span", { class: "key" }, key[1]), `${key[2]}\n`] : `${line}\n`;
    });
  return h(
    "details",
    { class: "card" },
    h("summary", {}, h("h2", {}, "Config"), h("span", {}, "config.resolved.yaml")),
    h("pre", { id: "config" }, lines),
  );
}

/** @param {OverviewData} run */
function environmentPanel(run) {
  const rows = Object.entries(run.environment);
  if (!rows.length) return null;
  return h(
    "details",
    { class: "card" },
    h("summary", {}, h("h2", {}, "Versions"), h("span", {}, "env.json")),
    h(
      "table",
      { id: "environment" },
      h(
        "tbody",
        {},
        rows.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, value))),
      ),
    ),
  );
}
