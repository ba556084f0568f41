// Curves of several runs, one over the other: bands are intervals, over problems for a run and over seeds for pooled runs.

const HELD_OUT = { title: "Held-out accuracy", evaluation: "accuracy", percent: true };
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
const MIN_STEPS_TO_SMOOTH = 15;
const LONGEST = Math.max(0, ...DATA.runs.map(({ hours }) => hours ?? 0));
const CLOCK = LONGEST < 2 ? { unit: "min", perHour: 60 } : { unit: "h", perHour: 1 };

const drawn = []; // [element, chart, height] of every chart on the page
const hiddenGroups = new Set();
let smoothing = 0.6;
let axis = "steps";
let zoomed = null;

const across = (value) => (axis === "hours" ? value * CLOCK.perHour : value);

// Points of one run or of pooled runs for a chart: {x, y, low, high}, low and high null where there is no interval.
function runPoints(number, chart) {
  const run = DATA.curves.runs[number];
  const rows = chart.evaluation
    ? run.evaluations.map((e) => ({ steps: e.step, hours: e.hours, y: e[chart.evaluation], low: e.low, high: e.high }))
    : run.steps.map((step, at) => ({ steps: step, hours: run.hours[at], y: run.series[chart.key]?.[at] }));
  const kept = rows.filter((row) => isNumber(row.y) && isNumber(row[axis]));
  const bounded = chart.evaluation === "accuracy" && kept.length > 0 && kept.every((row) => isNumber(row.low) && isNumber(row.high));
  return {
    x: kept.map((row) => across(row[axis])),
    y: kept.map((row) => row.y),
    low: bounded ? kept.map((row) => row.low) : null,
    high: bounded ? kept.map((row) => row.high) : null,
  };
}

function pooledPoints(group, chart) {
  const pool = DATA.curves.groups[group.at];
  const line = chart.evaluation ? pool.evaluations[chart.evaluation] : pool.series[chart.key];
  if (!line) return { x: [], y: [], low: null, high: null };
  const kept = line[axis].map((_, at) => at).filter((at) => isNumber(line[axis][at]));
  const pick = (name) => kept.map((at) => line[name][at]);
  return { x: pick(axis).map(across), y: pick("mean"), low: pick("low"), high: pick("high") };
}

function hasChart(chart) {
  return DATA.runs.some((_, number) => runPoints(number, chart).y.length > 0);
}

// Exponential moving average, corrected for its start.
function smoothed(values) {
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}

function translucent(colour, share) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${share})`;
}

function groupTraces(group, chart, limits) {
  const colour = css(group.hue);
  const smooth = (values) => (smoothing > 0 && !chart.evaluation && values.length >= MIN_STEPS_TO_SMOOTH ? smoothed(values) : values);
  const format = chart.percent ? ".2%" : ".5~g";
  const traces = [];
  const main = group.pooled ? pooledPoints(group, chart) : runPoints(group.runs[0], chart);
  if (main.low && main.x.length) {
    const edge = (values) => smooth(values).map((value) => Math.min(limits[1], Math.max(limits[0], value)));
    const hidden = { x: main.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    traces.push({ ...hidden, y: edge(main.low) }, { ...hidden, y: edge(main.high), fill: "tonexty", fillcolor: translucent(colour, 0.16) });
  }
  if (group.pooled)
    for (const number of group.runs) {
      const { x, y } = runPoints(number, chart);
      traces.push({ x, y: smooth(y), mode: "lines", line: { color: colour, width: 1, dash: "dot" }, opacity: 0.45, hoverinfo: "skip" });
    }
  traces.push({
    x: main.x,
    y: smooth(main.y),
    name: group.name,
    mode: chart.evaluation || main.x.length < MIN_STEPS_TO_SMOOTH ? "lines+markers" : "lines",
    line: { color: colour, width: 2, dash: group.dash },
    marker: { color: colour, size: chart.evaluation ? 6 : 4 },
    customdata: main.x.map((_, at) =>
      main.low ? ` [${[main.low[at], main.high[at]].map((value) => (chart.percent ? (100 * value).toFixed(1) : figure(value))).join(", ")}]` : "",
    ),
    hovertemplate: `%{y:${format}}%{customdata}`,
  });
  return traces.filter(({ x }) => x.length);
}

// Bands do not stretch a chart by more than half of what its lines span.
function bandLimits(chart) {
  const values = DATA.runs.flatMap((_, number) => {
    const { y, low, high } = runPoints(number, chart);
    return [...y, ...(low || []), ...(high || [])];
  });
  const [least, most] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const room = 0.5 * (most - least || Math.abs(most) || 1);
  return [least >= 0 ? Math.max(0, least - room) : least - room, chart.percent ? Math.min(1, most + room) : most + room];
}

function drawChart(element, chart, height) {
  const limits = bandLimits(chart);
  const traces = GROUPS.filter(({ at }) => !hiddenGroups.has(at)).flatMap((group) => groupTraces(group, chart, limits));
  const known = drawn.some(([other]) => other === element);
  const x = {
    ticksuffix: axis === "hours" ? ` ${CLOCK.unit}` : "",
    unifiedhovertitle: { text: axis === "hours" ? `%{x:.3~f} ${CLOCK.unit}` : "step %{x}" },
    ...(zoomed ? { range: zoomed } : {}),
  };
  const y = { tickformat: chart.percent ? ".2~p" : "", rangemode: limits[0] >= 0 ? "nonnegative" : "normal" };
  const layout = plotLayout(height, { l: 50, r: 14, t: 10, b: 28 }, x, y);
  Plotly.react(element, traces, layout, { responsive: true, displayModeBar: false, doubleClick: "reset+autosize" });
  if (known) return;
  drawn.push([element, chart, height]);
  element.on("plotly_relayout", zoomAll);
}

// A zoom in one chart is a zoom in all of them.
function zoomAll(change) {
  const range =
    "xaxis.range[0]" in change ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : change["xaxis.autorange"] ? null : undefined;
  if (range === undefined || String(range) === String(zoomed)) return;
  zoomed = range;
  for (const [element] of drawn)
    if (element.offsetParent)
      Plotly.relayout(element, {
        ...(range ? { "xaxis.range": range } : { "xaxis.autorange": true }),
        "yaxis.autorange": true,
      });
}

function redraw() {
  for (const each of drawn) drawChart(...each);
}

function headline() {
  if (!hasChart(HELD_OUT)) return h("div", { class: "card" }, h("h2", {}, "Held-out accuracy"), h("p", { class: "empty" }, "No run has an evaluation yet."));
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
  const others = DATA.runs.filter(({ versus, last }) => last && versus && !versus.difference).map(({ name }) => name);
  return others.length > 0 && h("p", { class: "hint", id: "apart" }, `Not comparable with the first run, see above: ${others.join(", ")}.`);
}

function bandWords() {
  const pooled = GROUPS.filter((group) => group.pooled).length;
  const problems = "band: 95 % interval over problems";
  const seeds = "95 % t-interval over seeds, cut where it is far wider than the lines";
  return !pooled ? problems : pooled === GROUPS.length ? `band: ${seeds}` : `${problems}; of pooled runs ${seeds}`;
}

function drawHeadline() {
  if (byId("headline")) drawChart(byId("headline"), HELD_OUT, 320);
}

// The key of all charts; a click hides a line everywhere.
function lineToggles() {
  return h(
    "div",
    { class: "lines", role: "group", "aria-label": "lines" },
    GROUPS.map((group) =>
      h(
        "button",
        { "aria-pressed": String(!hiddenGroups.has(group.at)), "data-group": group.at, onclick: () => toggleGroup(group.at) },
        swatch(group),
        group.name,
      ),
    ),
  );
}

function toggleGroup(at) {
  if (!hiddenGroups.delete(at)) hiddenGroups.add(at);
  for (const button of document.querySelectorAll(`.lines [data-group="${at}"]`))
    button.setAttribute("aria-pressed", String(!hiddenGroups.has(at)));
  redraw();
}

function showCurves() {
  const view = byId("curves");
  if (!SECTIONS.some(({ charts }) => charts.some(hasChart))) {
    view.append(h("p", { class: "empty" }, "No metrics yet: metrics.jsonl is missing or empty in every run."));
    return;
  }
  const hours = DATA.curves.runs.map(({ hours }) => hours.some(isNumber));
  axis = readAddress().settings.get("x") === "hours" && hours.some(Boolean) ? "hours" : "steps";
  const queue = [];
  view.append(
    h(
      "div",
      { class: "bar" },
      h("div", { class: "choice", role: "group", "aria-label": "horizontal axis" }, axisButton("steps", "by step"), axisButton("hours", "by time", !hours.some(Boolean))),
      h(
        "label",
        {},
        "Smoothing ",
        h("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: smoothing, id: "smoothing", oninput: smooth }),
      ),
      h(
        "span",
        { class: "hint" },
        "Drag over a chart to zoom all, double-click to reset.",
        GROUPS.some(({ pooled }) => pooled) && " Pooled runs: mean and t-interval over seeds, as far as all seeds have come; the faint lines are the single runs.",
        DATA.curves.every > 1 && ` Every ${DATA.curves.every}th step is drawn.`,
      ),
    ),
    lineToggles(),
  );
  const untimed = DATA.runs.filter((_, number) => !hours[number]).map(({ name }) => name);
  view.append(
    h("p", { class: "hint", id: "hours-words", hidden: axis !== "hours" }, hourWords(untimed)),
  );
  for (const section of SECTIONS) addSection(view, section, queue);
  const rest = otherCharts();
  if (rest.length) {
    const box = h("details", { class: "section" }, h("summary", {}, h("h2", {}, "Everything else"), h("span", {}, plural(rest.length, "chart"))));
    box.addEventListener("toggle", () => {
      if (!box.open || box.dataset.filled) return;
      box.dataset.filled = "true";
      const more = [];
      addSection(box, { charts: rest }, more);
      drawQueue(more);
    });
    view.append(box);
  }
  drawQueue(queue);
}

function hourWords(untimed) {
  return ["Time: the sum of the steps' own times, without evaluations.", untimed.length > 0 && ` No step times in ${untimed.join(", ")}: not drawn.`];
}

function otherCharts() {
  const named = new Set(["val/accuracy", "val/greedy", "val/score", ...SECTIONS.flatMap(({ charts }) => charts.map(({ key }) => key))]);
  const keys = new Set(DATA.curves.runs.flatMap(({ series }) => Object.keys(series)));
  return [...keys]
    .filter((key) => !named.has(key))
    .sort()
    .map((key) => ({ title: key, key }));
}

function addSection(parent, { title, charts }, queue) {
  const shown = charts.filter(hasChart);
  if (!shown.length) return;
  const grid = h("div", { class: "grid" });
  for (const chart of shown) {
    const plot = h("div", { class: "plot" });
    const without = DATA.runs.filter((_, number) => !runPoints(number, chart).y.length).length;
    grid.append(
      h(
        "figure",
        { class: "card" },
        h("figcaption", {}, h("h3", {}, chart.title, chart.unit && h("small", {}, ` ${chart.unit}`)), without > 0 && h("small", {}, `not in ${plural(without, "run")}`)),
        plot,
      ),
    );
    queue.push([plot, chart]);
  }
  if (title) parent.append(h("h2", { class: "section" }, title));
  parent.append(grid);
}

// A few charts a frame, so that the page answers meanwhile.
function drawQueue(queue) {
  for (const [plot, chart] of queue.splice(0, 4)) drawChart(plot, chart, 210);
  if (queue.length) requestAnimationFrame(() => drawQueue(queue));
  else byId("curves").dataset.drawn = "true";
}

function axisButton(value, text, disabled = false) {
  return h("button", { "data-axis": value, "aria-pressed": String(axis === value), disabled, onclick: () => chooseAxis(value) }, text);
}

function chooseAxis(value) {
  axis = value;
  zoomed = null;
  writeAddress("curves", { x: value === "hours" ? "hours" : "" });
  for (const button of document.querySelectorAll("[data-axis]")) button.setAttribute("aria-pressed", String(button.dataset.axis === value));
  byId("hours-words").hidden = value !== "hours";
  redraw();
}

function smooth(event) {
  smoothing = Number(event.target.value);
  redraw();
}
