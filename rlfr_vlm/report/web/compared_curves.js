// Curves of several runs, one over the other: bands are intervals, over problems for a run and over
// seeds for pooled runs.

import { DATA, GROUPS, swatch } from "./comparison_data.js";
import { chartGrid } from "./curves.js";
import { byId, css, h, parts } from "./dom.js";
import { figure, isNumber, plural } from "./format.js";
import { plotLayout } from "./plots.js";
import {
  MIN_STEPS_TO_SMOOTH,
  bandLimits,
  pooledPoints,
  runPoints,
  smoothed,
  translucent,
  unnamed,
} from "./series.js";
import { readAddress, writeAddress } from "./tabs.js";

/** @import { Clock, ComparedChart, Queue, Range, Section, SeedGroup, Trace } from "./types" */

/** @type {ComparedChart} */
const HELD_OUT = { title: "Held-out accuracy", evaluation: "accuracy", percent: true };

/** @type {Section<ComparedChart>[]} */
const SECTIONS = [
  {
    title: "Outcome",
    charts: [
      HELD_OUT,
      { title: "Held-out accuracy, greedy", evaluation: "greedy", percent: true },
      { title: "Training accuracy", key: "reward/accuracy", percent: true },
      { title: "Reward", key: "reward/mean" },
      { title: "Groups without signal", key: "reward/frac_zero_std", percent: true },
    ],
  },
  {
    title: "Responses",
    charts: [
      { title: "Response length", unit: "tokens", key: "response_length/mean" },
      { title: "Held-out response length", unit: "tokens", key: "val/response_length" },
      { title: "Truncated responses", key: "response_length/clip_ratio", percent: true },
      { title: "Entropy", unit: "nats per token", key: "actor/entropy" },
      { title: "Repetition", key: "response/repetition", percent: true },
    ],
  },
  {
    title: "Policy update",
    charts: [
      { title: "KL to sampling policy", unit: "nats", key: "actor/ppo_kl" },
      { title: "KL to reference", unit: "nats", key: "actor/kl" },
      { title: "Gradient norm", key: "actor/grad_norm" },
      { title: "Clipped tokens", key: "actor/pg_clipfrac", percent: true },
      { title: "Learning rate", key: "actor/lr" },
    ],
  },
  {
    title: "Flow field",
    charts: [
      { title: "Flow AUC", unit: "wrong strays further than right", key: "flow/auc" },
      { title: "Flow AUC among siblings", key: "flow/auc_in_group" },
      { title: "Flow loss", key: "flow/loss" },
      { title: "Velocity deviation", key: "flow/deviation_mean" },
      { title: "Flow reward", unit: "per response", key: "flow/reward_mean" },
      { title: "Flow share of advantage", key: "flow/advantage_share", percent: true },
      { title: "Groups that only the flow moves", key: "flow/only_groups_frac", percent: true },
      { title: "Drift of the field", key: "flow/drift" },
    ],
  },
  {
    title: "Engine and speed",
    charts: [
      { title: "Rollout–trainer gap", unit: "log-prob", key: "rollout/logprob_diff_mean" },
      { title: "Throughput", unit: "tokens/s", key: "perf/tokens_per_s" },
      { title: "Time per step", unit: "seconds", key: "timing_s/step" },
    ],
  },
];

const LONGEST = Math.max(0, ...DATA.runs.map(({ hours }) => hours ?? 0));

const CLOCK = LONGEST < 2 ? { unit: "min", perHour: 60 } : { unit: "h", perHour: 1 };

/** @type {Set<number>} */
const hiddenGroups = new Set();

/** @type {"steps" | "hours"} */
let axis = "steps";

/** @returns {Clock} */
const clock = () => ({ axis, scale: axis === "hours" ? CLOCK.perHour : 1 });

/**
 * @param {number} run
 * @param {ComparedChart} chart
 */
const pointsOf = (run, chart) => runPoints(DATA.curves.runs[run], chart, clock());

/** @param {ComparedChart} chart */
function numWithout(chart) {
  return DATA.runs.filter((_, run) => !pointsOf(run, chart).y.length).length;
}

/** @param {ComparedChart} chart */
const hasChart = (chart) => numWithout(chart) < DATA.runs.length;

/**
 * @param {SeedGroup} group
 * @param {ComparedChart} chart
 * @param {Range} limits
 * @param {number} smoothing
 * @returns {Trace[]}
 */
function groupTraces(group, chart, limits, smoothing) {
  const colour = css(group.hue);
  const smooth = (/** @type {number[]} */ values) =>
    smoothing > 0 && !chart.evaluation && values.length >= MIN_STEPS_TO_SMOOTH
      ? smoothed(values, smoothing)
      : values;
  const told = (/** @type {number} */ value) =>
    chart.percent ? (100 * value).toFixed(1) : figure(value);
  const format = chart.percent ? ".2%" : ".5~g";
  /** @type {Trace[]} */
  const traces = [];
  const main = group.pooled
    ? pooledPoints(DATA.curves.groups[group.at], chart, clock())
    : pointsOf(group.runs[0], chart);
  const { low, high } = main;
  if (low && high && main.x.length) {
    const edge = (/** @type {number[]} */ values) =>
      smooth(values).map((value) => Math.min(limits[1], Math.max(limits[0], value)));
    const hidden = { x: main.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    traces.push(
      { ...hidden, y: edge(low) },
      { ...hidden, y: edge(high), fill: "tonexty", fillcolor: translucent(colour, 0.16) },
    );
  }
  if (group.pooled)
    for (const number of group.runs) {
      const { x, y } = pointsOf(number, chart);
      traces.push({
        x,
        y: smooth(y),
        mode: "lines",
        line: { color: colour, width: 1, dash: "dot" },
        opacity: 0.45,
        hoverinfo: "skip",
      });
    }
  traces.push({
    x: main.x,
    y: smooth(main.y),
    name: group.name,
    mode: chart.evaluation || main.x.length < MIN_STEPS_TO_SMOOTH ? "lines+markers" : "lines",
    line: { color: colour, width: 2, dash: group.dash },
    marker: { color: colour, size: chart.evaluation ? 6 : 4 },
    customdata: main.x.map((_, at) =>
      low && high ? ` [${told(low[at])}, ${told(high[at])}]` : "",
    ),
    hovertemplate: `%{y:${format}}%{customdata}`,
  });
  return traces.filter(({ x }) => x.length);
}

/** @param {ComparedChart} chart */
function limitsOf(chart) {
  return bandLimits(
    DATA.runs.map((_, run) => pointsOf(run, chart)),
    chart.percent === true,
  );
}

/** The charts of both views. */
export const comparedCharts = chartGrid({
  height: 210,
  aside(/** @type {ComparedChart} */ chart) {
    const without = numWithout(chart);
    return without > 0 && h("small", {}, `not in ${plural(without, "run")}`);
  },
  traces(chart, smoothing) {
    const limits = limitsOf(chart);
    const shown = GROUPS.filter(({ at }) => !hiddenGroups.has(at));
    return shown.flatMap((group) => groupTraces(group, chart, limits, smoothing));
  },
  layout(chart, height) {
    const hours = axis === "hours";
    const title = hours ? `%{x:.3~f} ${CLOCK.unit}` : "step %{x}";
    const x = { ticksuffix: hours ? ` ${CLOCK.unit}` : "", unifiedhovertitle: { text: title } };
    const rangemode = limitsOf(chart)[0] >= 0 ? "nonnegative" : "normal";
    const y = { tickformat: chart.percent ? ".2~p" : "", rangemode };
    return plotLayout(height, { l: 50, r: 14, t: 10, b: 28 }, x, y);
  },
});

export function headline() {
  if (!hasChart(HELD_OUT))
    return h(
      "div",
      { class: "card" },
      h("h2", {}, "Held-out accuracy"),
      h("p", { class: "empty" }, "No run has an evaluation yet."),
    );
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "Held-out accuracy ", h("small", {}, bandWords())),
    lineToggles(),
    h("div", { id: "headline", class: "plot" }),
    apart(),
  );
}

// Lines that lie in one chart without being comparable.
function apart() {
  const others = DATA.runs
    .filter(({ versus, last }) => last && versus && !versus.difference)
    .map(({ name }) => name);
  return (
    others.length > 0 &&
    h(
      "p",
      { class: "hint", id: "apart" },
      `Not comparable with the first run, see above: ${others.join(", ")}.`,
    )
  );
}

function bandWords() {
  const pooled = GROUPS.filter((group) => group.pooled).length;
  const problems = "band: 95 % interval over problems";
  const seeds = "95 % t-interval over seeds, cut where it is far wider than the lines";
  return !pooled
    ? problems
    : pooled === GROUPS.length
      ? `band: ${seeds}`
      : `${problems}; of pooled runs ${seeds}`;
}

export function drawHeadline() {
  if (byId("headline")) comparedCharts.draw(byId("headline"), HELD_OUT, 320);
}

// The key of all charts; a click hides a line everywhere.
function lineToggles() {
  return h(
    "div",
    { class: "lines", role: "group", "aria-label": "lines" },
    GROUPS.map((group) =>
      h(
        "button",
        {
          "aria-pressed": String(!hiddenGroups.has(group.at)),
          "data-group": group.at,
          onclick: () => toggleGroup(group.at),
        },
        swatch(group),
        group.name,
      ),
    ),
  );
}

/** @param {number} at */
function toggleGroup(at) {
  if (!hiddenGroups.delete(at)) hiddenGroups.add(at);
  for (const button of parts(document, `.lines [data-group="${at}"]`))
    button.setAttribute("aria-pressed", String(!hiddenGroups.has(at)));
  comparedCharts.redraw();
}

export function showCurves() {
  const view = byId("curves");
  if (!SECTIONS.some(({ charts }) => charts.some(hasChart))) {
    view.append(
      h("p", { class: "empty" }, "No metrics yet: metrics.jsonl is missing or empty in every run."),
    );
    return;
  }
  const hours = DATA.curves.runs.map(({ hours }) => hours.some(isNumber));
  axis = readAddress().settings.get("x") === "hours" && hours.some(Boolean) ? "hours" : "steps";
  /** @type {Queue<ComparedChart>} */
  const queue = [];
  view.append(
    h(
      "div",
      { class: "bar" },
      h(
        "div",
        { class: "choice", role: "group", "aria-label": "horizontal axis" },
        axisButton("steps", "by step"),
        axisButton("hours", "by time", !hours.some(Boolean)),
      ),
      comparedCharts.smoothingSlider(),
      h(
        "span",
        { class: "hint" },
        "Drag over a chart to zoom all, double-click to reset.",
        GROUPS.some(({ pooled }) => pooled) &&
          " Pooled runs: mean and t-interval over seeds, as far as all seeds have come; the " +
            "faint lines are the single runs.",
        DATA.curves.every > 1 && ` Every ${DATA.curves.every}th step is drawn.`,
      ),
    ),
    lineToggles(),
  );
  const untimed = DATA.runs.filter((_, number) => !hours[number]).map(({ name }) => name);
  view.append(
    h("p", { class: "hint", id: "hours-words", hidden: axis !== "hours" }, hourWords(untimed)),
  );
  for (const { title, charts } of SECTIONS) {
    const shown = charts.filter(hasChart);
    if (shown.length)
      view.append(h("h2", { class: "section" }, title), comparedCharts.cards(shown, queue));
  }
  const rest = otherCharts();
  if (rest.length) {
    const box = h(
      "details",
      { class: "section" },
      h("summary", {}, h("h2", {}, "Everything else"), h("span", {}, plural(rest.length, "chart"))),
    );
    box.addEventListener("toggle", () => {
      if (!box.open || box.dataset.filled) return;
      box.dataset.filled = "true";
      /** @type {Queue<ComparedChart>} */
      const more = [];
      box.append(comparedCharts.cards(rest, more));
      comparedCharts.drawQueue(more, view);
    });
    view.append(box);
  }
  comparedCharts.drawQueue(queue, view);
}

/** @param {string[]} untimed */
function hourWords(untimed) {
  return [
    "Time: the sum of the steps' own times, without evaluations.",
    untimed.length > 0 && ` No step times in ${untimed.join(", ")}: not drawn.`,
  ];
}

/**
 * The charts that no section names.
 * @returns {ComparedChart[]}
 */
function otherCharts() {
  const named = SECTIONS.flatMap(({ charts }) => charts.map(({ key }) => key));
  const metrics = DATA.curves.runs.flatMap(({ series }) => Object.keys(series));
  const others = unnamed(metrics, named).map((key) => ({ title: key, key }));
  return others.filter(hasChart);
}

/**
 * @param {"steps" | "hours"} value
 * @param {string} text
 * @param {boolean} disabled
 */
function axisButton(value, text, disabled = false) {
  return h(
    "button",
    {
      "data-axis": value,
      "aria-pressed": String(axis === value),
      disabled,
      onclick: () => chooseAxis(value),
    },
    text,
  );
}

/** @param {"steps" | "hours"} value */
function chooseAxis(value) {
  axis = value;
  writeAddress("curves", { x: value === "hours" ? "hours" : "" });
  for (const button of parts(document, "[data-axis]"))
    button.setAttribute("aria-pressed", String(button.dataset.axis === value));
  byId("hours-words").hidden = value !== "hours";
  comparedCharts.rescale();
}
