import assert from "node:assert/strict";
import { test } from "node:test";

import {
  bandLimits,
  pooledPoints,
  runPoints,
  smoothed,
  translucent,
  unnamed,
  zoomRange,
} from "../../../rlfr_vlm/report/web/series.js";

const STEPS = { axis: "steps", scale: 1 };
const MINUTES = { axis: "hours", scale: 60 };
const RUN = {
  steps: [1, 2, 3],
  hours: [0.5, null, 1.5],
  series: { "reward/mean": [0.1, null, 0.3], "actor/lr": [1, 2, 3] },
  evaluations: [
    { step: 0, hours: 0, accuracy: 0.2, low: 0.1, high: 0.3, greedy: 0.25 },
    { step: 3, hours: 1.5, accuracy: 0.6, low: 0.5, high: 0.7, greedy: null },
  ],
};

test("smoothing is a mean that is corrected for its start", () => {
  assert.deepEqual(
    smoothed([5, 5, 5], 0.9).map((value) => value.toFixed(9)),
    Array(3).fill("5.000000000"),
  );
  const [first, second] = smoothed([1, 4], 0.5);
  assert.equal(first, 1);
  assert.equal(second, (0.5 * 0.5 * 1 + 0.5 * 4) / 0.75);
  assert.deepEqual(smoothed([1, 7, 2], 0), [1, 7, 2]);
});

test("a change of a chart is a range, a reset, or of something else", () => {
  assert.deepEqual(zoomRange({ "xaxis.range[0]": 2, "xaxis.range[1]": 9 }), [2, 9]);
  assert.equal(zoomRange({ "xaxis.autorange": true }), null);
  assert.equal(zoomRange({ "yaxis.range[0]": 1 }), undefined);
});

test("metrics that no chart names come in order, once, without those of the evaluations", () => {
  assert.deepEqual(unnamed(["b", "a", "b", "val/greedy", "c"], ["c", undefined]), ["a", "b"]);
});

test("points of a run: steps without a value, or without a time, are left out", () => {
  assert.deepEqual(runPoints(RUN, { title: "", key: "reward/mean" }, STEPS), {
    x: [1, 3],
    y: [0.1, 0.3],
    low: null,
    high: null,
  });
  assert.deepEqual(runPoints(RUN, { title: "", key: "actor/lr" }, MINUTES).x, [30, 90]);
  assert.deepEqual(runPoints(RUN, { title: "", key: "nothing" }, STEPS).y, []);
});

test("only an accuracy of which every point has an interval has a band", () => {
  const accuracy = { title: "", evaluation: "accuracy" };
  assert.deepEqual(runPoints(RUN, accuracy, STEPS), {
    x: [0, 3],
    y: [0.2, 0.6],
    low: [0.1, 0.5],
    high: [0.3, 0.7],
  });
  assert.equal(runPoints(RUN, { title: "", evaluation: "greedy" }, STEPS).low, null);
  const one = { ...RUN, evaluations: [{ ...RUN.evaluations[0], low: null }, RUN.evaluations[1]] };
  assert.equal(runPoints(one, accuracy, STEPS).low, null);
});

test("points of pooled runs", () => {
  const line = { steps: [1, 2], hours: [0.5, null], mean: [3, 4], low: [2, 3], high: [4, 5] };
  const pool = { series: { a: line }, evaluations: {} };
  assert.deepEqual(pooledPoints(pool, { title: "", key: "a" }, MINUTES), {
    x: [30],
    y: [3],
    low: [2],
    high: [4],
  });
  assert.deepEqual(pooledPoints(pool, { title: "", evaluation: "greedy" }, STEPS).x, []);
  assert.deepEqual(pooledPoints(null, { title: "", key: "a" }, STEPS).x, []);
});

test("bands reach no further than half of what the lines span", () => {
  const line = (y, low = null, high = null) => ({ x: [], y, low, high });
  assert.deepEqual(bandLimits([line([1, 3])], false), [0, 4]);
  assert.deepEqual(bandLimits([line([10, 12])], false), [9, 13]);
  assert.deepEqual(bandLimits([line([-1, 1])], false), [-2, 2]);
  assert.deepEqual(bandLimits([line([0.5], [0.3], [0.9])], true), [0, 1]);
  assert.deepEqual(bandLimits([line([2, 2])], false), [1, 3]); // no span: half of the value
});

test("a colour as a translucent one", () => {
  assert.equal(translucent("#ff8000", 0.16), "rgba(255,128,0,0.16)");
});
