// The view of curves of a run.

import { byId, h } from "./dom.js";
import { eventPanel } from "./events.js";
import { SECTIONS, chartLines, isDrawable, runCharts } from "./run_charts.js";
import { RUN } from "./run_data.js";
import { unnamed } from "./series.js";

/** @import { Queue, RunChart } from "./types" */

/** The charts that no section names. */
function otherCharts() {
  const named = SECTIONS.flatMap(({ charts }) =>
    charts.flatMap(({ lines }) => lines.map(([key]) => key)),
  );
  return unnamed(Object.keys(RUN.curves.metrics.series), named).map(
    (key) => /** @type {RunChart} */ ({ title: key, lines: [[key, ""]] }),
  );
}

/**
 * Metrics of a chart that the run did not log.
 * @param {RunChart} chart
 */
function notLogged(chart) {
  const logged = chartLines(chart);
  return chart.source
    ? []
    : chart.lines.filter((line) => !logged.includes(line)).map(([key]) => key);
}

export function showCurves() {
  const view = byId("curves");
  const { metrics, evaluations } = RUN.curves;
  if (!metrics.steps.length && !evaluations.length) {
    view.append(h("p", { class: "empty" }, "No metrics yet: metrics.jsonl is missing or empty."));
    return;
  }
  view.append(
    eventPanel(true) || "",
    h(
      "div",
      { class: "bar" },
      runCharts.smoothingSlider(),
      h(
        "span",
        { class: "hint" },
        "Over training steps. Drag over a chart to zoom all, double-click to reset; the faint " +
          "line is the raw value, which hovering shows.",
        metrics.every > 1 ? ` Every ${metrics.every}th step is drawn.` : "",
      ),
      h(
        "button",
        {
          class: "link",
          id: "all-steps",
          hidden: true,
          onclick: () => runCharts.zoom({ "xaxis.autorange": true }),
        },
        "show all steps",
      ),
    ),
  );
  const sections = [...SECTIONS, { title: "Everything else", charts: otherCharts() }];
  /** @type {Queue<RunChart>} */
  const queue = [];
  for (const { title, charts } of sections) {
    const shown = charts.filter(isDrawable);
    if (shown.length)
      view.append(h("h2", { class: "section" }, title), runCharts.cards(shown, queue));
  }
  const missing = sections.flatMap(({ charts }) => charts.flatMap(notLogged));
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
  runCharts.drawQueue(queue, view);
}
