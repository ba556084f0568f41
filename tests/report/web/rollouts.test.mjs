import assert from "node:assert/strict";
import { test } from "node:test";

import { matching, placed, searchHits } from "../../../rlfr_vlm/report/web/rollout_filters.js";

const response = (verdict, more = {}) => ({
  verdict,
  text: `said ${verdict}`,
  prediction: "",
  finish: "stop",
  numFlowTokens: 0,
  ...more,
});
const head = (step, id, responses) => ({
  step,
  id,
  question: `question ${id}`,
  answer: "42",
  source: "digits",
  images: [],
  responses,
});
const ALL = { step: "all", responses: "all", groups: "all", search: "", shade: "", attention: "" };
const groups = () =>
  placed([
    head(1, "a", [response("correct"), response("wrong", { finish: "length" })]),
    head(1, "b", [response("correct"), response("correct", { numFlowTokens: 2 })]),
    head(2, "c", [response("wrong"), response("error", { prediction: "Seven" })]),
  ]);
const found = (settings) =>
  matching(groups(), { ...ALL, ...settings }).map(({ group, shown }) => [group.id, ...shown]);

test("groups know their place in their step and how many of their responses are right", () => {
  assert.deepEqual(
    groups().map(({ at, right }) => [at, right]),
    [
      [0, 1],
      [1, 2],
      [0, 0],
    ],
  );
  assert.deepEqual(placed([]), []);
});

test("filters of responses and of groups", () => {
  assert.deepEqual(found({}), [
    ["a", 0, 1],
    ["b", 0, 1],
    ["c", 0, 1],
  ]);
  assert.deepEqual(found({ step: "2" }), [["c", 0, 1]]);
  assert.deepEqual(found({ responses: "wrong" }), [
    ["a", 1],
    ["c", 0],
  ]);
  assert.deepEqual(found({ responses: "error" }), [["c", 1]]);
  assert.deepEqual(found({ responses: "truncated" }), [["a", 1]]);
  assert.deepEqual(found({ responses: "flow" }), [["b", 1]]);
  assert.deepEqual(found({ groups: "mixed" }), [["a", 0, 1]]);
  assert.deepEqual(found({ groups: "right", responses: "correct" }), [["b", 0, 1]]);
  assert.deepEqual(found({ groups: "wrong" }), [["c", 0, 1]]);
});

test("a search finds questions, and responses by their text and answer", () => {
  assert.deepEqual(found({ search: " QUESTION B " }), [["b", 0, 1]]);
  assert.deepEqual(found({ search: "seven" }), [["c", 1]]);
  assert.deepEqual(found({ search: "said wrong" }), [
    ["a", 1],
    ["c", 0],
  ]);
  assert.deepEqual(found({ search: "nowhere" }), []);
});

test("hits are the tokens that a found text touches", () => {
  const tokens = ["The", " pic", "ture", " is", " a", " Picture"];
  assert.deepEqual([...searchHits(tokens, "picture")], [1, 2, 5]);
  assert.deepEqual([...searchHits(tokens, "  ")], []);
  assert.deepEqual([...searchHits(["aa", "aa"], "aa")], [0, 1]);
});
