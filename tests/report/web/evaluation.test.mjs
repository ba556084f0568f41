import assert from "node:assert/strict";
import { test } from "node:test";

import {
  ORDERS,
  facetsOf,
  noTallies,
  passes,
  prepared,
} from "../../../rlfr_vlm/report/web/filters.js";

const FACETS = facetsOf([{ name: "math500" }, { name: "gsm8k" }]);
const problem = (benchmark, samples, source = "") =>
  prepared({
    benchmark,
    id: "p",
    question: "",
    golds: [],
    source,
    images: [],
    chunk: 0,
    at: 0,
    samples: samples.map((sample, index) => ({ index, prediction: "1", ...sample })),
  });
const chosen = (choice) => ({
  benchmark: new Set(),
  verdict: new Set(),
  only: new Set(),
  source: new Set(),
  ...Object.fromEntries(Object.entries(choice).map(([name, values]) => [name, new Set(values)])),
});

test("a problem counts right and decided samples, and samples know what is odd about them", () => {
  const { right, counted, samples } = problem(0, [
    { verdict: "correct" },
    { verdict: "wrong", finish: "length" },
    { verdict: "unjudged", prediction: undefined },
    { verdict: "unanswered", prediction: undefined },
    { verdict: "wrong", rule: "correct", judge: { verdict: "wrong" } },
    { verdict: "wrong", rule: "wrong", judge: { verdict: "failed" } },
  ]);
  assert.deepEqual([right, counted], [1, 4]);
  assert.deepEqual(
    samples.map(({ traits }) => traits),
    [[], ["truncated"], ["unread"], [], ["disagreement"], []],
  );
});

test("any of a facet's values will do, but all of the chosen traits are needed", () => {
  const one = problem(1, [{ verdict: "wrong", finish: "length", prediction: undefined }], "web");
  const fits = (choice) => passes(one.samples[0], one, FACETS, chosen(choice), noTallies());
  assert.equal(fits({}), true);
  assert.equal(fits({ benchmark: ["math500", "gsm8k"], verdict: ["wrong", "error"] }), true);
  assert.equal(fits({ benchmark: ["math500"] }), false);
  assert.equal(fits({ only: ["truncated", "unread"] }), true);
  assert.equal(fits({ only: ["truncated", "disagreement"] }), false);
  assert.equal(fits({ source: ["web"] }), true);
  assert.equal(fits({ source: [""] }), false);
});

test("a sample is counted for every choice that would show it", () => {
  const one = problem(0, [{ verdict: "wrong" }, { verdict: "correct", finish: "length" }]);
  const tallies = noTallies();
  const picked = chosen({ verdict: ["wrong"], only: [] });
  assert.deepEqual(
    one.samples.map((sample) => passes(sample, one, FACETS, picked, tallies)),
    [true, false],
  );
  // The other verdict is one more choice away; what it has besides is shown by no single choice.
  assert.deepEqual(
    [...tallies.verdict],
    [
      ["wrong", 1],
      ["correct", 1],
    ],
  );
  assert.deepEqual([...tallies.only], []);
  assert.deepEqual([...tallies.benchmark], [["math500", 1]]);
});

test("a trait that would be chosen besides is counted only where all chosen ones are", () => {
  const one = problem(0, [{ verdict: "wrong", finish: "length" }]);
  const tallies = noTallies();
  assert.equal(passes(one.samples[0], one, FACETS, chosen({ only: ["unread"] }), tallies), false);
  assert.deepEqual([...tallies.only], []);
});

test("orders: problems without a counted sample are the hardest", () => {
  const none = problem(0, [{ verdict: "pending", tokens: 5 }]);
  const half = problem(0, [{ verdict: "correct", tokens: 900 }, { verdict: "wrong" }]);
  const all = problem(0, [{ verdict: "correct", tokens: 10 }]);
  const sorted = (name) => [all, none, half].sort(ORDERS[name][1]);
  assert.deepEqual(sorted("hardest"), [none, half, all]);
  assert.deepEqual(sorted("easiest"), [all, half, none]);
  assert.deepEqual(sorted("longest"), [half, all, none]);
  assert.equal(ORDERS.file[1], null);
});
