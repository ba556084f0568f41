import assert from "node:assert/strict";
import { test } from "node:test";

import { heat, heatRamp, strengths } from "../../../rlfr_vlm/report/web/heat.js";
import { ramp, shadeOf } from "../../../rlfr_vlm/report/web/scales.js";

const SIGNED = { kind: "signed", low: -2, high: 2 };
const SIZE = { kind: "magnitude", low: 1, high: 3 };

test("signed values have two hues, as strong as they are far from zero", () => {
  assert.equal(shadeOf(1, SIGNED), "rgb(var(--bonus) / 0.375)");
  assert.equal(shadeOf(-2, SIGNED), "rgb(var(--penalty) / 0.750)");
  assert.equal(shadeOf(-99, SIGNED), "rgb(var(--penalty) / 0.750)");
  assert.equal(shadeOf(0, SIGNED), "");
});

test("magnitudes start at the low end of their scale, reversed ones at the high end", () => {
  assert.equal(shadeOf(2, SIZE), "rgb(var(--magnitude) / 0.375)");
  assert.equal(shadeOf(1, SIZE), "");
  assert.equal(shadeOf(3, SIZE, true), "");
  assert.equal(shadeOf(0, SIZE, true), "rgb(var(--magnitude) / 0.750)");
});

test("no value, no scale, no colour; a scale of one value divides by nothing", () => {
  for (const value of [null, undefined]) assert.equal(shadeOf(value, SIZE), "");
  assert.equal(shadeOf(1, undefined), "");
  assert.equal(shadeOf(5, { kind: "magnitude", low: 5, high: 5 }), "");
  assert.equal(shadeOf(0, { kind: "signed", low: 0, high: 0 }), "");
});

test("a legend runs from end to end", () => {
  assert.equal(
    ramp(SIZE),
    "linear-gradient(to right, transparent, rgb(var(--magnitude) / 0.188), " +
      "rgb(var(--magnitude) / 0.375), rgb(var(--magnitude) / 0.563), rgb(var(--magnitude) / 0.750))",
  );
});

test("heat lies between its neighbours, and its ends are those of the ramp", () => {
  assert.deepEqual(heat(0), [92, 60, 210, 0]);
  assert.deepEqual(heat(1), [255, 92, 0, 0.68]);
  assert.deepEqual(heat(0.1).slice(0, 3), [101, 55, 212.5]);
  assert.match(heatRamp(), /^linear-gradient\(to right, rgb\(92 60 210 \/ 0\) 0%, .* 100%\)$/);
});

test("strengths of one token are its bytes; the mean counts each token by its share", () => {
  const cells = Uint8Array.from([255, 0, 51, 51]);
  assert.deepEqual(strengths(cells, { share: [0.3, 0.1] }, 0), [1, 0]);
  assert.deepEqual(strengths(cells, { share: [0.3, 0.1] }, 1), [0.2, 0.2]);
  const [first, second] = strengths(cells, { share: [0.3, 0.1] }, null);
  assert.equal(first, 1); // 0.3 + 0.05, the most
  assert.ok(Math.abs(second - 0.05 / 0.35) < 1e-12);
  assert.deepEqual(strengths(new Uint8Array(4), { share: [0, 0] }, null), [0, 0]);
});
