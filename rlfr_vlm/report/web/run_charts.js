// The charts of a run, grouped; a chart appears when the run logged its metrics.

import { chartGrid } from "./curves.js";
import { byId, css, h } from "./dom.js";
import { eventMarks } from "./event_marks.js";
import { figure, isNumber, percent } from "./format.js";
import { plotLayout } from "./plots.js";
import { RUN } from "./run_data.js";
import { MIN_STEPS_TO_SMOOTH, smoothed } from "./series.js";

/** @import { EvaluationPoint } from "./data" */
/** @import { RunChart, Section, Trace } from "./types" */

/** @type {RunChart} */
export const ACCURACY = {
  title: "Accuracy",
  lines: [["reward/accuracy", "training"]],
  evaluations: true,
  percent: true,
};

/** @type {Section<RunChart>[]} */
export const SECTIONS = [
  {
    title: "Outcome",
    charts: [
      ACCURACY,
      {
        title: "Reward",
        lines: [
          ["reward/mean", "mean"],
          ["reward/format", "format"],
        ],
      },
      {
        title: "Groups without signal",
        lines: [["reward/frac_zero_std", "all siblings earned the same"]],
        percent: true,
      },
      { title: "Ungraded responses", lines: [["reward/error_frac", "share"]], percent: true },
    ],
  },
  {
    title: "Responses",
    charts: [
      {
        title: "Response length",
        unit: "tokens",
        fromZero: true,
        lines: [
          ["response_length/mean", "mean"],
          ["val/response_length", "held-out"],
          ["response_length/max", "longest"],
          ["response_length/min", "shortest"],
        ],
      },
      {
        title: "Truncated responses",
        lines: [["response_length/clip_ratio", "share"]],
        percent: true,
      },
      { title: "Entropy", unit: "nats per token", lines: [["actor/entropy", "policy"]] },
      { title: "Repeated 4-grams", lines: [["response/repetition", "share"]], percent: true },
      {
        title: "Reward and length",
        unit: "correlation among siblings",
        lines: [["reward/length_corr", "correlation"]],
        level: 0,
      },
    ],
  },
  {
    title: "Policy update",
    charts: [
      { title: "Gradient norm", lines: [["actor/grad_norm", "before clipping"]] },
      { title: "Policy loss", lines: [["actor/pg_loss", "policy"]] },
      { title: "Clipped tokens", lines: [["actor/pg_clipfrac", "share"]], percent: true },
      { title: "KL to sampling policy", unit: "nats", lines: [["actor/ppo_kl", "approximate"]] },
      { title: "Learning rate", lines: [["actor/lr", "policy"]] },
      {
        title: "Size of the update",
        unit: "of the weights",
        lines: [["actor/update_ratio", "relative"]],
      },
    ],
  },
  {
    title: "Flow field",
    charts: [
      {
        title: "Flow loss",
        lines: [
          ["flow/loss", "online"],
          ["flow/contrast_loss", "contrast"],
        ],
        level: () => RUN.flow.reference,
      },
      {
        title: "Wrong strays further",
        unit: "AUC",
        lines: [
          ["flow/auc", "all pairs"],
          ["flow/auc_in_group", "siblings"],
        ],
        level: 0.5,
      },
      {
        title: "Wrong is charged more",
        unit: "AUC",
        lines: [
          ["flow/charged_auc", "all pairs"],
          ["flow/charged_auc_in_group", "siblings"],
        ],
        level: 0.5,
      },
      {
        title: "Place of the charge",
        unit: "0 start, 1 end",
        lines: [["flow/charge_place", "mean"]],
        level: 0.5,
      },
      {
        title: "Charge explained without a field",
        lines: [
          ["flow/charge_by_token", "by token"],
          ["flow/charge_by_place", "by place"],
        ],
        percent: true,
      },
      {
        title: "Flow reward",
        unit: "per response",
        lines: [["flow/reward_mean", "sum over its tokens"]],
      },
      { title: "Velocity deviation", lines: [["flow/deviation_mean", "mean"]] },
      {
        title: "Rewarded tokens",
        unit: "per response",
        lines: [["flow/num_reward_tokens", "with a flow reward"]],
      },
      {
        title: "Spread of deviations",
        unit: "within a response",
        lines: [["flow/deviation_spread", "relative to their mean"]],
      },
      {
        title: "Flow share of advantage",
        lines: [["flow/advantage_share", "share"]],
        percent: true,
      },
      {
        title: "Groups moved by the flow alone",
        lines: [["flow/only_groups_frac", "share"]],
        percent: true,
      },
      { title: "Drift of the field", lines: [["flow/drift", "of the weights"]], percent: true },
      { title: "Responses learned from", lines: [["flow/selected_frac", "share"]], percent: true },
      { title: "Flow gradient norm", lines: [["flow/grad_norm", "online"]] },
      { title: "Flow learning rate", lines: [["flow/lr", "online"]] },
      {
        title: "Offline fit",
        unit: "by fit step",
        source: "flowFit",
        lines: [
          ["loss", "training"],
          ["eval_loss", "held-out"],
        ],
      },
    ],
  },
  {
    title: "Engine and speed",
    charts: [
      {
        title: "Rollout–trainer gap",
        unit: "log-prob",
        lines: [["rollout/logprob_diff_mean", "mean"]],
      },
      { title: "Rollout–trainer ratio", lines: [["rollout/ratio_mean", "mean"]], level: 1 },
      {
        title: "Surprise of sampled tokens",
        unit: "nats",
        lines: [["rollout/surprisal_gap", "beyond the entropy"]],
        level: 0,
      },
      { title: "Throughput", unit: "tokens/s", lines: [["perf/tokens_per_s", "response tokens"]] },
      {
        title: "Time per step",
        unit: "seconds",
        fromZero: true,
        lines: [
          ["timing_s/step", "step"],
          ["timing_s/rollout", "rollout"],
          ["timing_s/update", "update"],
          ["timing_s/reward", "reward"],
        ],
      },
    ],
  },
];

const HUES = ["--series-1", "--series-2", "--series-3", "--muted"];

/** @param {RunChart} chart */
function chartColumns(chart) {
  return RUN.curves[chart.source || "metrics"];
}

/** @param {RunChart} chart */
export function chartLines(chart) {
  return chart.lines.filter(([key]) => chartColumns(chart).series[key]?.some(isNumber));
}

// Whether its x are the steps of training.
const bySteps = (/** @type {RunChart} */ chart) => chart.source !== "flowFit";

/** @param {RunChart} chart */
export function isDrawable(chart) {
  return (
    chartLines(chart).length > 0 ||
    (chart.evaluations === true && RUN.curves.evaluations.length > 0)
  );
}

/** @param {RunChart} chart */
function lastValue(chart) {
  const lines = chartLines(chart);
  if (!lines.length) return null;
  const value = chartColumns(chart).series[lines[0][0]].filter(isNumber).at(-1);
  return h("output", { title: "last value" }, chart.percent ? percent(value) : figure(value));
}

/** @param {RunChart} chart */
export function chartKey(chart) {
  const names = chartLines(chart).map(([, label], at) => [label, HUES[at], "line"]);
  if (chart.evaluations && RUN.curves.evaluations.length)
    names.push(["held-out", HUES[1], "dot"], ["held-out greedy", HUES[2], "diamond"]);
  return h(
    "p",
    { class: "chart-key" },
    names
      .filter(([label]) => label)
      .map(([label, hue, mark]) => {
        const sign = h("i", { class: mark });
        sign.style.color = css(hue) && `var(${hue})`;
        return h("span", {}, sign, label);
      }),
  );
}

/**
 * @param {RunChart} chart
 * @param {string} key
 * @param {string} label
 * @param {string} hue
 * @param {number} smoothing
 * @returns {Trace[]}
 */
function lineTraces(chart, key, label, hue, smoothing) {
  const { steps, series } = chartColumns(chart);
  const x = steps.filter((_, at) => isNumber(series[key][at]));
  const y = series[key].filter(isNumber);
  const colour = css(hue);
  const smooth = smoothing > 0 && y.length >= MIN_STEPS_TO_SMOOTH;
  const raw = {
    x,
    y,
    name: label || "value",
    mode: y.length < MIN_STEPS_TO_SMOOTH ? "lines+markers" : "lines",
    line: { color: colour, width: smooth ? 1 : 2 },
    marker: { color: colour, size: 5 },
    opacity: smooth ? 0.35 : 1,
    hovertemplate: chart.percent ? "%{y:.2%}" : "%{y:.6~g}",
  };
  return smooth
    ? [
        raw,
        {
          x,
          y: smoothed(y, smoothing),
          mode: "lines",
          line: { color: colour, width: 2 },
          hoverinfo: "skip",
        },
      ]
    : [raw];
}

/** @returns {Trace[]} */
function evaluationTraces() {
  const points = RUN.curves.evaluations;
  /**
   * @param {"accuracy" | "greedy"} key
   * @param {string} name
   * @param {string} hue
   * @param {string} symbol
   */
  const trace = (key, name, hue, symbol) => {
    const shown = points.filter((point) => isNumber(point[key]));
    /** @type {Trace & { shown: EvaluationPoint[] }} */
    const traced = {
      x: shown.map((point) => point.step),
      y: shown.map((point) => point[key]),
      name,
      mode: "lines+markers",
      line: { color: css(hue), width: 1.5, dash: "dot" },
      marker: { color: css(hue), size: 7, symbol },
      hovertemplate: "%{y:.2%}%{customdata}",
      shown,
      customdata: shown.map(() => ""),
    };
    return traced;
  };
  const sampled = trace("accuracy", "held-out", HUES[1], "circle");
  const bounded = sampled.shown.every((point) => isNumber(point.low));
  if (bounded) {
    sampled.error_y = {
      type: "data",
      symmetric: false,
      array: sampled.shown.map((point) => Number(point.high) - Number(point.accuracy)),
      arrayminus: sampled.shown.map((point) => Number(point.accuracy) - Number(point.low)),
      color: css(HUES[1]),
      thickness: 1.2,
      width: 3,
    };
    sampled.customdata = sampled.shown.map(
      (point) =>
        ` [${(100 * Number(point.low)).toFixed(1)}, ${(100 * Number(point.high)).toFixed(1)}]`,
    );
  }
  return [sampled, trace("greedy", "held-out greedy", HUES[2], "diamond-open")]
    .filter((each) => each.x.length)
    .map(({ shown, ...rest }) => rest);
}

/**
 * A thin line at each step with events, and what was said there under the pointer: one path for all
 * warnings, one for what ended the run.
 * @returns {Trace[]}
 */
function eventTraces() {
  marks ??= eventMarks(RUN.events.events, RUN.curves.metrics.steps);
  return marks.map(({ hue, x, y, text, sizes }) => ({
    x,
    y,
    text,
    yaxis: "y2",
    name: "",
    mode: sizes ? "lines+markers" : "lines",
    opacity: 0.75,
    line: { color: css(hue), width: 1, dash: "dot" },
    marker: { color: css(hue), symbol: "triangle-down", size: sizes || 0, line: { width: 0 } },
    hovertemplate: "%{text}<extra></extra>",
    cliponaxis: false,
  }));
}

/** @type {ReturnType<typeof eventMarks> | null} */
let marks = null; // worked out once for all curves

/** @param {RunChart} chart */
const levelOf = ({ level }) => (typeof level === "function" ? level() : level);

/**
 * A thin line at a value that means something: chance, no correlation, a ratio of one, a field that
 * knows nothing.
 * @param {RunChart} chart
 * @returns {Trace}
 */
function levelTrace(chart) {
  const steps = chartColumns(chart).steps;
  const line = { color: css("--muted"), width: 1, dash: "dot" };
  return {
    x: [steps[0], steps[steps.length - 1]],
    y: [levelOf(chart), levelOf(chart)],
    mode: "lines",
    line,
    hoverinfo: "skip",
  };
}

/** The charts of all views of a run. */
export const runCharts = chartGrid({
  height: 190,
  aside: lastValue,
  key: chartKey,
  follows: bySteps,
  traces(/** @type {RunChart} */ chart, smoothing) {
    const lines = chartLines(chart);
    const traces = lines.flatMap(([key, label], at) =>
      lineTraces(chart, key, label, HUES[at], smoothing),
    );
    if (chart.evaluations) traces.push(...evaluationTraces());
    if (isNumber(levelOf(chart)) && traces.length) traces.push(levelTrace(chart));
    if (bySteps(chart) && traces.length) traces.push(...eventTraces());
    return traces;
  },
  layout(chart, height) {
    const layout = plotLayout(
      height,
      { l: 46, r: 16, t: 10, b: 26 },
      { unifiedhovertitle: { text: "step %{x}" } },
      {
        fixedrange: false,
        tickformat: chart.percent ? ".2~p" : "",
        rangemode: chart.percent || chart.fromZero ? "tozero" : "normal",
      },
    );
    layout.yaxis2 = { overlaying: "y", range: [0, 1], fixedrange: true, visible: false };
    return layout;
  },
  zoomed(range) {
    if (byId("all-steps")) byId("all-steps").hidden = !range;
  },
});
