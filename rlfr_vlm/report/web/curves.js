// The curves: small charts of the metrics, grouped; a chart appears when the run logged its metrics.

const ACCURACY = { title: "Accuracy", lines: [["reward/accuracy", "training"]], evaluations: true, percent: true };
const SECTIONS = [
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
      { title: "Groups without signal", lines: [["reward/frac_zero_std", "all siblings earned the same"]], percent: true },
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
      { title: "Truncated responses", lines: [["response_length/clip_ratio", "share"]], percent: true },
      { title: "Entropy", unit: "nats per token", lines: [["actor/entropy", "policy"]] },
      { title: "Repeated 4-grams", lines: [["response/repetition", "share"]], percent: true },
      { title: "Reward and length", unit: "correlation among siblings", lines: [["reward/length_corr", "correlation"]], level: 0 },
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
      { title: "Size of the update", unit: "of the weights", lines: [["actor/update_ratio", "relative"]] },
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
      { title: "Place of the charge", unit: "0 start, 1 end", lines: [["flow/charge_place", "mean"]], level: 0.5 },
      {
        title: "Charge explained without a field",
        lines: [
          ["flow/charge_by_token", "by token"],
          ["flow/charge_by_place", "by place"],
        ],
        percent: true,
      },
      { title: "Flow reward", unit: "per response", lines: [["flow/reward_mean", "sum over its tokens"]] },
      { title: "Velocity deviation", lines: [["flow/deviation_mean", "mean"]] },
      { title: "Rewarded tokens", unit: "per response", lines: [["flow/num_reward_tokens", "with a flow reward"]] },
      { title: "Spread of deviations", unit: "within a response", lines: [["flow/deviation_spread", "relative to their mean"]] },
      { title: "Flow share of advantage", lines: [["flow/advantage_share", "share"]], percent: true },
      { title: "Groups moved by the flow alone", lines: [["flow/only_groups_frac", "share"]], percent: true },
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
      { title: "Rollout–trainer gap", unit: "log-prob", lines: [["rollout/logprob_diff_mean", "mean"]] },
      { title: "Rollout–trainer ratio", lines: [["rollout/ratio_mean", "mean"]], level: 1 },
      { title: "Surprise of sampled tokens", unit: "nats", lines: [["rollout/surprisal_gap", "beyond the entropy"]], level: 0 },
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
const MIN_STEPS_TO_SMOOTH = 15;

let drawn = []; // [element, chart, height] of every chart on the page, to draw again in other colours
let smoothing = 0.6;
let curvesShown = false;
let zoomed = null; // the step range all charts show

function chartColumns(chart) {
  return RUN.curves[chart.source || "metrics"];
}

function chartLines(chart) {
  return chart.lines.filter(([key]) => chartColumns(chart).series[key]?.some(isNumber));
}

function otherCharts() {
  const named = new Set([
    "val/accuracy",
    "val/greedy",
    "val/score",
    ...SECTIONS.flatMap((section) => section.charts.flatMap((chart) => chart.lines.map(([key]) => key))),
  ]);
  return Object.keys(RUN.curves.metrics.series)
    .filter((key) => !named.has(key))
    .sort()
    .map((key) => ({ title: key, lines: [[key, ""]] }));
}

function showCurves() {
  if (curvesShown) return;
  curvesShown = true;
  const view = byId("curves");
  const missing = [];
  const queue = [];
  const columns = RUN.curves.metrics;
  if (!columns.steps.length && !RUN.curves.evaluations.length) {
    view.append(h("p", { class: "empty" }, "No metrics yet: metrics.jsonl is missing or empty."));
    return;
  }
  view.append(
    eventPanel(true) || "",
    h(
      "div",
      { class: "bar" },
      h(
        "label",
        {},
        "Smoothing ",
        h("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: smoothing, id: "smoothing", oninput: smooth }),
      ),
      h(
        "span",
        { class: "hint" },
        "Over training steps. Drag over a chart to zoom all, double-click to reset; the faint line is the raw value, which hovering shows.",
        columns.every > 1 ? ` Every ${columns.every}th step is drawn.` : "",
      ),
      h("button", { class: "link", id: "all-steps", hidden: !zoomed, onclick: () => zoomAll({ "xaxis.autorange": true }) }, "show all steps"),
    ),
  );
  for (const section of [...SECTIONS, { title: "Everything else", charts: otherCharts() }]) {
    const charts = section.charts.filter((chart) => chartLines(chart).length || (chart.evaluations && RUN.curves.evaluations.length));
    missing.push(
      ...section.charts.flatMap((chart) =>
        chart.source ? [] : chart.lines.filter((line) => !chartLines(chart).includes(line)).map(([key]) => key),
      ),
    );
    if (!charts.length) continue;
    const grid = h("div", { class: "grid" });
    for (const chart of charts) grid.append(figureCard(chart, queue));
    view.append(h("h2", { class: "section" }, section.title), grid);
  }
  if (missing.length)
    view.append(
      h(
        "p",
        { class: "foot" },
        "Not logged in this run: ",
        missing.map((key, at) => [at ? ", " : "", h("code", {}, key)]),
        ".",
      ),
    );
  drawQueue(queue, view);
}

// A chart with its title and key, put in the queue to be drawn; `reading` says how to read it.
function figureCard(chart, queue, reading) {
  const plot = h("div", { class: "plot" });
  queue.push([plot, chart]);
  return h(
    "figure",
    { class: "card" },
    h("figcaption", {}, h("h3", {}, chart.title, chart.unit && h("small", {}, ` ${chart.unit}`)), lastValue(chart)),
    reading && h("p", { class: "reading" }, reading),
    chartKey(chart),
    plot,
  );
}

// A few charts a frame, so that the page answers meanwhile.
function drawQueue(queue, view) {
  for (const [plot, chart] of queue.splice(0, 4)) drawChart(plot, chart, 190);
  if (queue.length) requestAnimationFrame(() => drawQueue(queue, view));
  else view.dataset.drawn = "true";
}

function lastValue(chart) {
  const lines = chartLines(chart);
  if (!lines.length) return null;
  const value = chartColumns(chart).series[lines[0][0]].filter(isNumber).at(-1);
  return h("output", { title: "last value" }, chart.percent ? percent(value) : figure(value));
}

function chartKey(chart) {
  const names = chartLines(chart).map(([, label], at) => [label, HUES[at], "line"]);
  if (chart.evaluations && RUN.curves.evaluations.length) names.push(["held-out", HUES[1], "dot"], ["held-out greedy", HUES[2], "diamond"]);
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

// Exponential moving average, corrected for its start (as TensorBoard draws it).
function smoothed(values) {
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}

function lineTraces(chart, key, label, hue) {
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
  return smooth ? [raw, { x, y: smoothed(y), mode: "lines", line: { color: colour, width: 2 }, hoverinfo: "skip" }] : [raw];
}

function evaluationTraces() {
  const points = RUN.curves.evaluations;
  const trace = (key, name, hue, symbol) => {
    const shown = points.filter((point) => isNumber(point[key]));
    return {
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
  };
  const sampled = trace("accuracy", "held-out", HUES[1], "circle");
  const bounded = sampled.shown.every((point) => isNumber(point.low));
  if (bounded) {
    sampled.error_y = {
      type: "data",
      symmetric: false,
      array: sampled.shown.map((point) => point.high - point.accuracy),
      arrayminus: sampled.shown.map((point) => point.accuracy - point.low),
      color: css(HUES[1]),
      thickness: 1.2,
      width: 3,
    };
    sampled.hovertemplate = "%{y:.2%}%{customdata}";
    sampled.customdata = sampled.shown.map((point) => ` [${(100 * point.low).toFixed(1)}, ${(100 * point.high).toFixed(1)}]`);
  }
  return [sampled, trace("greedy", "held-out greedy", HUES[2], "diamond-open")]
    .filter((each) => each.x.length)
    .map(({ shown, ...rest }) => rest);
}

function drawChart(element, chart, height) {
  const traces = chartLines(chart).flatMap(([key, label], at) => lineTraces(chart, key, label, HUES[at]));
  if (chart.evaluations) traces.push(...evaluationTraces());
  if (isNumber(levelOf(chart)) && traces.length) traces.push(levelTrace(chart));
  if (bySteps(chart) && traces.length) traces.push(...eventTraces());
  const known = drawn.some(([other]) => other === element);
  const margin = { l: 46, r: 16, t: 10, b: 26 };
  const rangemode = chart.percent || chart.fromZero ? "tozero" : "normal";
  const layout = plotLayout(
    height,
    margin,
    { unifiedhovertitle: { text: "step %{x}" } },
    { fixedrange: false, tickformat: chart.percent ? ".2~p" : "", rangemode },
  );
  layout.yaxis2 = { overlaying: "y", range: [0, 1], fixedrange: true, visible: false };
  if (zoomed && bySteps(chart)) layout.xaxis.range = zoomed;
  element.dataset.zoom = String(bySteps(chart) ? zoomed : null);
  Plotly.react(element, traces, layout, { responsive: true, displayModeBar: false, doubleClick: "reset+autosize" });
  if (known) return;
  drawn.push([element, chart, height]);
  if (bySteps(chart)) element.on("plotly_relayout", zoomAll);
}

const levelOf = ({ level }) => (typeof level === "function" ? level() : level);

// A thin line at a value that means something: chance, no correlation, a ratio of one, a field that knows nothing.
function levelTrace(chart) {
  const steps = chartColumns(chart).steps;
  const line = { color: css("--muted"), width: 1, dash: "dot" };
  return { x: [steps[0], steps.at(-1)], y: [levelOf(chart), levelOf(chart)], mode: "lines", line, hoverinfo: "skip" };
}

const bySteps = (chart) => chart.source !== "flowFit"; // whether its x are the steps of training

// A zoom in one chart is a zoom in all of them.
function zoomAll(change) {
  const range =
    "xaxis.range[0]" in change ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : change["xaxis.autorange"] ? null : undefined;
  if (range === undefined || String(range) === String(zoomed)) return;
  zoomed = range;
  zoomShown();
}

// Charts of views that are not open are zoomed when their view is opened.
function zoomShown() {
  if (byId("all-steps")) byId("all-steps").hidden = !zoomed;
  for (const [element, chart] of drawn) {
    if (!bySteps(chart) || !element.offsetParent || element.dataset.zoom === String(zoomed)) continue;
    element.dataset.zoom = String(zoomed);
    Plotly.relayout(
      element,
      zoomed ? { "xaxis.range": zoomed, "yaxis.autorange": true } : { "xaxis.autorange": true, "yaxis.autorange": true },
    );
  }
}

function smooth(event) {
  smoothing = Number(event.target.value);
  recolourCharts();
}

function recolourCharts() {
  for (const [element, chart, height] of drawn) drawChart(element, chart, height);
}
