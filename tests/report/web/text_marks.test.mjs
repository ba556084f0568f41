import assert from "node:assert/strict";
import { test } from "node:test";

import { answerRange, merged, pieces, ranges } from "../../../rlfr_vlm/report/web/text_marks.js";

const answered = (text, prediction) => {
  const range = answerRange(text, prediction);
  return range && [range.from, text.slice(range.from, range.to)];
};

test("the answer is found in the last box that holds it", () => {
  assert.deepEqual(answered("\\boxed{1} then \\boxed{12} and 12", "12"), [22, "12"]);
  assert.deepEqual(answered("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), [7, "\\frac{1}{2}"]);
  assert.deepEqual(answered("\\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}"), [7, "\\dfrac{1}{2}"]);
  assert.deepEqual(answered("so <answer>7</answer>, not 7", "7"), [11, "7"]);
  assert.deepEqual(answered("\\boxed{a\\}b}", "a\\}b"), [7, "a\\}b"]);
});

test("else where it stands last, as a word of its own", () => {
  assert.deepEqual(answered("12 is 2, not 22", "2"), [6, "2"]);
  assert.equal(answered("22", "2"), null);
  assert.equal(answered("anything", " "), null);
  assert.deepEqual(answered("2", "2"), [0, "2"]);
  assert.equal(answered("\\boxed{1", "2"), null); // a box without an end
});

test("formulas and hits are marked, and the answer", () => {
  const text = "Is $x^2$ a Square? It costs $5 or $6.";
  assert.deepEqual(ranges(text, "square", { from: 0, to: 2 }), [
    { kind: "tex", from: 3, to: 8 },
    { kind: "hit", from: 11, to: 17 },
    { kind: "answer", from: 0, to: 2 },
  ]);
});

test("pieces are cut where a mark begins or ends, and cover the text once", () => {
  const all = [
    { kind: "tex", from: 2, to: 8 },
    { kind: "hit", from: 4, to: 10 },
  ];
  assert.deepEqual(pieces(0, 12, all), [
    { from: 0, to: 2, kinds: [] },
    { from: 2, to: 4, kinds: ["tex"] },
    { from: 4, to: 8, kinds: ["tex", "hit"] },
    { from: 8, to: 10, kinds: ["hit"] },
    { from: 10, to: 12, kinds: [] },
  ]);
  assert.deepEqual(pieces(5, 6, all), [{ from: 5, to: 6, kinds: ["tex", "hit"] }]);
});

test("windows are joined where little lies between them and end between words", () => {
  const text = "word ".repeat(400);
  const windows = merged(
    [
      [1990, 2100],
      [0, 101],
      [250, 301],
      [900, 950],
    ],
    text,
  );
  assert.deepEqual(windows, [
    [0, 304],
    [904, 954],
    [1994, 2000],
  ]);
});

test("a window does not end within a letter of two code units", () => {
  const text = "😀".repeat(500);
  const [[from, to]] = merged([[101, 301]], text);
  assert.deepEqual([from, to], [102, 302]);
});
