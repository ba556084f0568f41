// Steps of the map of latents: windows of them, and what lies in each.

import { sum } from "./format.js";

/** @import { LatentPoints } from "./data" */
/** @import { Frame, Range } from "./types" */

const FRAMES = 60; // positions of the slider, at most

const TRAIL = 8; // frames that a mean is taken over

/**
 * Windows of steps, one after the other, as many as the slider has positions; and the sums over
 * right and over wrong answers in each.
 * @param {LatentPoints} points
 * @returns {Frame[]}
 */
export function latentFrames({ step, x, y, verdict }) {
  const steps = [...new Set(step)];
  const each = Math.ceil(steps.length / FRAMES);
  /** @type {Frame[]} */
  const frames = [];
  for (let at = 0; at < steps.length; at += each)
    frames.push({
      first: steps[at],
      last: steps[Math.min(at + each, steps.length) - 1],
      points: [],
      sums: [],
    });
  const frameOf = new Map(steps.map((name, at) => [name, frames[Math.floor(at / each)]]));
  step.forEach((name, at) => frameOf.get(name)?.points.push(at));
  for (const frame of frames) {
    frame.sums = [0, 1].map((code) => {
      const members = frame.points.filter((at) => verdict[at] === code);
      return [members.length, sum(members.map((at) => x[at])), sum(members.map((at) => y[at]))];
    });
  }
  return frames;
}

/**
 * The middle and the extent of values without the outermost percent, so that one stray response
 * does not make specks of the others.
 * @param {number[]} values
 */
export function span(values) {
  const sorted = values.slice().sort((a, b) => a - b);
  const low = sorted[Math.floor(0.005 * (sorted.length - 1))];
  const high = sorted[Math.ceil(0.995 * (sorted.length - 1))];
  return { centre: (low + high) / 2, extent: Math.max(high - low, 1e-9) };
}

/**
 * The way of a mean up to a frame, at each place over TRAIL frames; none where there are fewer than
 * two responses.
 * @param {Frame[]} frames
 * @param {number} last
 * @param {number} code right or wrong
 */
export function trail(frames, last, code) {
  /** @type {Range[]} */
  const way = [];
  for (let at = 0; at <= last; at++) {
    const near = frames.slice(Math.max(0, at + 1 - TRAIL), at + 1).map(({ sums }) => sums[code]);
    const [number, x, y] = [0, 1, 2].map((place) => sum(near.map((sums) => sums[place])));
    if (number >= 2) way.push([x / number, y / number]);
  }
  return way;
}
