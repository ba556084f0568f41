// The grid of charts, of one run or of several: drawn a few a frame, smoothed and zoomed together.

import { h } from "./dom.js";
import { zoomRange } from "./series.js";

/** @import { Chart, Charts, PageEvent, Part, Queue, Range, Relayout } from "./types" */

/**
 * @template {Chart} C
 * @param {Charts<C>} page
 */
export function chartGrid({
  height,
  traces,
  layout,
  aside,
  key,
  follows = () => true,
  zoomed = () => {},
}) {
  /** @type {Map<Part, [C, number]>} */
  const drawn = new Map(); // every chart on the page with its height, to draw it again
  /** @type {{ smoothing: number, range: Range | null }} */
  const look = { smoothing: 0.6, range: null }; // of all charts; range: what they are zoomed to

  /**
   * @param {Part} element
   * @param {C} chart
   * @param {number} tall
   */
  function draw(element, chart, tall = height) {
    const own = layout(chart, tall);
    if (look.range && follows(chart)) own.xaxis.range = look.range;
    element.dataset.zoom = String(follows(chart) ? look.range : null);
    const options = { responsive: true, displayModeBar: false, doubleClick: "reset+autosize" };
    Plotly.react(element, traces(chart, look.smoothing), own, options);
    if (drawn.has(element)) return;
    drawn.set(element, [chart, tall]);
    if (follows(chart)) element.on("plotly_relayout", zoom);
  }

  function redraw() {
    for (const [element, [chart, tall]] of drawn) draw(element, chart, tall);
  }

  /**
   * A chart with its title and key, put in the queue to be drawn; `reading` says how to read it.
   * @param {C} chart
   * @param {Queue<C>} queue
   * @param {string} [reading]
   */
  function card(chart, queue, reading) {
    const plot = h("div", { class: "plot" });
    queue.push([plot, chart]);
    return h(
      "figure",
      { class: "card" },
      h(
        "figcaption",
        {},
        h("h3", {}, chart.title, chart.unit && h("small", {}, ` ${chart.unit}`)),
        aside(chart),
      ),
      reading && h("p", { class: "reading" }, reading),
      key?.(chart),
      plot,
    );
  }

  /**
   * Cards beside each other.
   * @param {C[]} charts
   * @param {Queue<C>} queue
   */
  function cards(charts, queue) {
    return h(
      "div",
      { class: "grid" },
      charts.map((chart) => card(chart, queue)),
    );
  }

  /**
   * A few charts a frame, so that the page answers meanwhile.
   * @param {Queue<C>} queue
   * @param {Part} view
   */
  function drawQueue(queue, view) {
    for (const [plot, chart] of queue.splice(0, 4)) draw(plot, chart);
    if (queue.length) requestAnimationFrame(() => drawQueue(queue, view));
    else view.dataset.drawn = "true";
  }

  /**
   * A zoom in one chart is a zoom in all of them.
   * @param {Relayout} change
   */
  function zoom(change) {
    const wanted = zoomRange(change);
    if (wanted === undefined || String(wanted) === String(look.range)) return;
    look.range = wanted;
    showZoom();
  }

  /** Charts of views that are not open are zoomed when their view is opened. */
  function showZoom() {
    const { range } = look;
    zoomed(range);
    for (const [element, [chart]] of drawn) {
      if (!follows(chart) || !element.offsetParent || element.dataset.zoom === String(range))
        continue;
      element.dataset.zoom = String(range);
      const along = range ? { "xaxis.range": range } : { "xaxis.autorange": true };
      Plotly.relayout(element, { ...along, "yaxis.autorange": true });
    }
  }

  /** Draws all charts again, whole: what they were zoomed to is no range of the new axis. */
  function rescale() {
    look.range = null;
    redraw();
  }

  function smoothingSlider() {
    const smooth = (/** @type {PageEvent} */ event) => {
      look.smoothing = Number(event.target.value);
      redraw();
    };
    return h(
      "label",
      {},
      "Smoothing ",
      h("input", {
        type: "range",
        min: 0,
        max: 0.95,
        step: 0.05,
        value: look.smoothing,
        id: "smoothing",
        oninput: smooth,
      }),
    );
  }

  return { look, draw, redraw, cards, card, drawQueue, zoom, showZoom, rescale, smoothingSlider };
}
