import assert from "node:assert/strict";
import { test } from "node:test";

import {
  bounds,
  count,
  duration,
  figure,
  median,
  percent,
  plainText,
  plural,
  points,
  sum,
} from "../../../rlfr_vlm/report/web/format.js";

test("figures have four significant digits and a real minus sign", () => {
  assert.equal(figure(12.3456), "12.35");
  assert.equal(figure(-0.5), "−0.5");
  assert.equal(figure(0.5, true), "+0.5");
  assert.equal(figure(0, true), "0");
  assert.equal(figure(0.00012345), "1.23e-4");
  assert.equal(figure(1234567), "1.23e+6");
  assert.equal(figure(999999), "1000000");
  for (const nothing of [null, undefined]) assert.equal(figure(nothing), "–");
});

test("small shares keep two digits instead of a zero", () => {
  assert.equal(percent(0.12345), "12.3 %");
  assert.equal(percent(0), "0.0 %");
  assert.equal(percent(1), "100.0 %");
  assert.equal(percent(0.9999), "99.99 %");
  assert.equal(percent(4.1e-15), "0.0 %");
  assert.equal(percent(0.00123), "0.12 %");
  assert.equal(percent(-0.00123), "-0.12 %");
  assert.equal(percent(null), "–");
});

test("differences are points with a sign", () => {
  assert.equal(points(0.0312), "+3.1");
  assert.equal(points(-0.2), "−20.0");
  assert.equal(points(0), "0.0");
});

test("numbers of things", () => {
  assert.equal(count(1234567), "1,234,567");
  assert.equal(plural(1, "step"), "1 step");
  assert.equal(plural(2000, "step"), "2,000 steps");
});

test("durations change their unit where the next one is easier to read", () => {
  assert.equal(duration(0.01), "< 0.1 s");
  assert.equal(duration(1.26), "1.3 s");
  assert.equal(duration(89), "89 s");
  assert.equal(duration(90), "1.5 min");
  assert.equal(duration(660), "11 min");
  assert.equal(duration(5400), "1.5 h");
});

test("the median passes over what is no number", () => {
  assert.equal(median([3, null, 1, 2]), 2);
  assert.equal(median([null]), null);
  assert.equal(median([]), null);
  assert.equal(median([10, 9, 100]), 10); // by size, not by their digits
});

test("sums and intervals", () => {
  assert.equal(sum([]), 0);
  assert.equal(sum([1, 2.5]), 3.5);
  assert.equal(bounds({ low: 0.1234, high: 0.5 }), "12.3 – 50.0");
});

test("hidden characters of plain text show as code points, white space as a space", () => {
  assert.equal(plainText("a\u202eb\u0007"), "aU+202EbU+0007");
  assert.equal(plainText("a\nb\tc"), "a b c");
});
