// The numbers of curves: smoothed, zoomed, pooled.

import { isNumber } from "./format.js";

/** @import { ComparedColumns, PooledColumns } from "./data" */
/** @import { Clock, ComparedChart, Points, Range, Relayout } from "./types" */

export const MIN_STEPS_TO_SMOOTH = 15;

/**
 * Exponential moving average, corrected for its start (as TensorBoard draws it).
 * @param {number[]} values
 * @param {number} smoothing from 0, which leaves them as they are, to below 1
 */
export function smoothed(values, smoothing) {
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}

/**
 * The range that a chart was zoomed to: null for all, undefined for a change of something else.
 * @param {Relayout} change
 * @returns {Range | null | undefined}
 */
export function zoomRange(change) {
  if ("xaxis.range[0]" in change) return [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  return change["xaxis.autorange"] ? null : undefined;
}

const IN_OTHER_CHARTS = ["val/accuracy", "val/greedy", "val/score"]; // with the evaluations

/**
 * Metrics that no chart names, in order.
 * @param {Iterable<string>} metrics
 * @param {(string | undefined)[]} named
 */
export function unnamed(metrics, named) {
  const known = new Set([...IN_OTHER_CHARTS, ...named]);
  return [...new Set(metrics)].filter((key) => !known.has(key)).sort();
}

/**
 * Points of one run for a chart.
 * @param {ComparedColumns} run
 * @param {ComparedChart} chart
 * @param {Clock} clock
 * @returns {Points}
 */
export function runPoints(run, { evaluation, key = "" }, { axis, scale }) {
  const rows = evaluation
    ? run.evaluations.map((e) => ({
        steps: e.step,
        hours: e.hours,
        y: e[evaluation],
        low: e.low,
        high: e.high,
      }))
    : run.steps.map((step, at) => ({
        steps: step,
        hours: run.hours[at],
        y: run.series[key]?.[at],
        low: null,
        high: null,
      }));
  const kept = rows.filter((row) => isNumber(row.y) && isNumber(row[axis]));
  const bounded =
    evaluation === "accuracy" &&
    kept.length > 0 &&
    kept.every((row) => isNumber(row.low) && isNumber(row.high));
  return {
    x: kept.map((row) => Number(row[axis]) * scale),
    y: kept.map((row) => Number(row.y)),
    low: bounded ? kept.map((row) => Number(row.low)) : null,
    high: bounded ? kept.map((row) => Number(row.high)) : null,
  };
}

/**
 * Points of runs that differ in their seed alone.
 * @param {PooledColumns | null} pool
 * @param {ComparedChart} chart
 * @param {Clock} clock
 * @returns {Points}
 */
export function pooledPoints(pool, { evaluation, key = "" }, { axis, scale }) {
  const line = evaluation ? pool?.evaluations[evaluation] : pool?.series[key];
  if (!line) return { x: [], y: [], low: null, high: null };
  const kept = line[axis].map((_, at) => at).filter((at) => isNumber(line[axis][at]));
  const pick = (/** @type {"steps" | "hours" | "mean" | "low" | "high"} */ name) =>
    kept.map((at) => Number(line[name][at]));
  return {
    x: pick(axis).map((value) => value * scale),
    y: pick("mean"),
    low: pick("low"),
    high: pick("high"),
  };
}

/**
 * How far bands may reach: they do not stretch a chart by more than half of what its lines span.
 * @param {Points[]} lines
 * @param {boolean} percent
 * @returns {Range}
 */
export function bandLimits(lines, percent) {
  const values = lines.flatMap(({ y, low, high }) => [...y, ...(low ?? []), ...(high ?? [])]);
  const [least, most] = values.reduce(
    ([a, b], value) => [Math.min(a, value), Math.max(b, value)],
    [Infinity, -Infinity],
  );
  const room = 0.5 * (most - least || Math.abs(most) || 1);
  return [
    least >= 0 ? Math.max(0, least - room) : least - room,
    percent ? Math.min(1, most + room) : most + room,
  ];
}

/**
 * @param {string} colour #rrggbb
 * @param {number} share
 */
export function translucent(colour, share) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${share})`;
}
