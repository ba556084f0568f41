import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateSync, gzipSync } from "node:zlib";

import {
  around,
  eventLabel,
  eventMarks,
  isMarked,
  loggedStep,
} from "../../../rlfr_vlm/report/web/event_marks.js";
import { inUnits, unitOf } from "../../../rlfr_vlm/report/web/flow_tokens.js";
import { latentFrames, span, trail } from "../../../rlfr_vlm/report/web/frames.js";
import { groupName } from "../../../rlfr_vlm/report/web/groups.js";
import { inflated } from "../../../rlfr_vlm/report/web/unpack.js";

const event = (step, action = "warn", more = {}) => ({
  ...{ step, action, since: null, monitor: "entropy", what: "fell", cause: "", do: "" },
  ...{ value: null, limit: null, to: null, ...more },
});

test("marks stand at steps of the curves, and what ended the run is apart", () => {
  assert.equal(isMarked([], event(1)), false);
  assert.equal(isMarked([2, 9], event(10)), false);
  const events = [event(5), event(3), event(5, "stop"), event(99)];
  const marks = eventMarks(events, [1, 10]);
  assert.deepEqual(
    marks.map(({ hue, x }) => [hue, x]),
    [
      ["--warn", [3, 3, null]],
      ["--bad", [5, 5, null]],
    ],
  );
  assert.equal(marks[1].text[0], "warning, entropy: fell<br>stopped, entropy: fell");
  assert.deepEqual(eventMarks([], [1, 10]), []);
});

test("labels hold no markup of the event's own and are broken into lines", () => {
  assert.equal(
    eventLabel(event(1, "warn", { what: "<b>a & b</b>\u202e" })),
    "warning, entropy: &lt;b&gt;a &amp; b&lt;/b&gt;U+202E",
  );
  const lines = eventLabel(event(1, "odd", { what: "word ".repeat(100) })).split("<br>");
  assert.equal(lines.length, 4);
  assert.ok(lines.every((line) => line.length <= 57));
});

test("an event leads to the last logged step of its steps, and to curves around them", () => {
  assert.equal(loggedStep([1, 4, 8], event(6, "warn", { since: 2 })), 4);
  assert.equal(loggedStep([1, 4, 8], event(6)), null);
  assert.deepEqual(around([1, 100], event(50, "warn", { since: 40 })), [30, 60]);
  assert.deepEqual(around([1, 100], event(2)), [1, 6]);
});

test("means of tokens are told in a power of ten", () => {
  const row = (reward, count) => ({ reward, count });
  const windows = [{ rewarded: [row(0.06, 2)], penalised: [row(-0.5, 100)] }];
  assert.equal(unitOf(windows), 0.01);
  assert.equal(unitOf([{ rewarded: [], penalised: [] }]), 1e-12);
  assert.equal(inUnits(0.034, 0.01), "+3.40");
  assert.equal(inUnits(-0.034, 0.01), "−3.40");
  assert.equal(inUnits(NaN, 1), "–");
});

test("latents fall into windows of steps with sums of right and of wrong answers", () => {
  const steps = Array.from({ length: 90 }, (_, at) => 10 * at);
  const points = {
    step: steps,
    x: steps.map(() => 1),
    y: steps.map(() => 2),
    verdict: steps.map((_, at) => at % 3),
  };
  const frames = latentFrames(points);
  assert.equal(frames.length, 45);
  assert.deepEqual(frames[0], {
    first: 0,
    last: 10,
    points: [0, 1],
    sums: [
      [1, 1, 2],
      [1, 1, 2],
    ],
  });
  assert.equal(frames.at(-1).last, 890);
  assert.deepEqual(latentFrames({ step: [], x: [], y: [], verdict: [] }), []);
});

test("a trail is a mean over the last frames, with two responses or more", () => {
  const frames = [
    [1, 1, 1],
    [1, 3, 5],
    [0, 0, 0],
  ].map((right) => ({ sums: [right, [0, 0, 0]] }));
  assert.deepEqual(trail(frames, 2, 0), [
    [2, 3],
    [2, 3],
  ]);
  assert.deepEqual(trail(frames, 2, 1), []);
});

test("the extent of values leaves the outermost percent out", () => {
  const values = Array.from({ length: 1000 }, (_, at) => at);
  const found = span([...values, 1e9, -1e9]);
  assert.ok(Math.abs(found.centre - 499.5) < 5 && found.extent < 1000);
  assert.equal(span([3]).extent, 1e-9);
});

test("names of seeds share their beginning", () => {
  assert.equal(groupName(["grpo_seed0", "grpo_seed1"]), "grpo, 2 seeds");
  assert.equal(groupName(["alone"]), "alone");
  assert.equal(groupName(["a1", "b2"]), "a1, b2");
});

test("blocks of the page unpack to what was packed", async () => {
  const tree = [{ text: "größer ❤", numbers: [1, null] }];
  const packed = gzipSync(JSON.stringify(tree)).toString("base64");
  assert.deepEqual(await inflated(packed, "gzip").json(), tree);
  const bytes = Buffer.from([0, 255, 7]);
  const cells = await inflated(deflateSync(bytes).toString("base64"), "deflate").arrayBuffer();
  assert.deepEqual([...new Uint8Array(cells)], [0, 255, 7]);
});
