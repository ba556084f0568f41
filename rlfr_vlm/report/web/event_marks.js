// Where events stand in the curves, and what is said there.

import { plainText } from "./format.js";

/** @import { LoggedEvent } from "./data" */
/** @import { Range } from "./types" */

/** @type {Record<string, [string, string]>} */
export const ACTIONS = {
  warn: ["warning", "warn"],
  stop: ["stopped", "stop"],
  roll_back: ["rolled back", "back"],
};

const MAX_SIGNS = 100; // in a curve; more lines go without a sign at their top

const WORDS_PER_LINE = 56; // letters, under the pointer

/**
 * Whether an event stands at steps that the curves have: a damaged number does not stretch them.
 * @param {number[]} steps
 * @param {LoggedEvent} event
 */
export function isMarked(steps, { step }) {
  return steps.length > 0 && step >= steps[0] && step <= steps[steps.length - 1];
}

/**
 * The last step of an event that is among those with rollouts on the page.
 * @param {number[]} logged
 * @param {LoggedEvent} event
 */
export function loggedStep(logged, { step, since }) {
  return logged.findLast((at) => at <= step && at >= (since ?? step)) ?? null;
}

/**
 * The steps around an event.
 * @param {number[]} steps
 * @param {LoggedEvent} event
 * @returns {Range}
 */
export function around(steps, { step, since }) {
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const from = Math.max(first, Math.min(since ?? step, step));
  const pad = Math.max(4, step - from);
  return [Math.max(first, from - pad), Math.min(last, step + pad)];
}

/**
 * Lines of the two kinds, those that ended the run apart.
 * @param {LoggedEvent[]} events
 * @param {number[]} steps that the curves have
 */
export function eventMarks(events, steps) {
  /** @type {Map<number, LoggedEvent[]>} */
  const byStep = new Map();
  for (const event of events.filter((each) => isMarked(steps, each)))
    byStep.set(event.step, [...(byStep.get(event.step) ?? []), event]);
  const warned = (/** @type {[number, LoggedEvent[]]} */ [, here]) =>
    here.every(({ action }) => !["stop", "roll_back"].includes(action));
  const marks = [...byStep].sort(([a], [b]) => a - b);
  /** @type {[string, [number, LoggedEvent[]][]][]} */
  const kinds = [
    ["--warn", marks.filter(warned)],
    ["--bad", marks.filter((mark) => !warned(mark))],
  ];
  return kinds
    .filter(([, some]) => some.length)
    .map(([hue, some]) => {
      const said = some.map(([, here]) => here.slice(0, 3).map(eventLabel).join("<br>"));
      return {
        hue,
        x: some.flatMap(([step]) => [step, step, null]),
        y: some.flatMap(() => [1, 0, null]),
        text: said.flatMap((text) => [text, text, ""]),
        sizes: some.length <= MAX_SIGNS && some.flatMap(() => [6, 0, 0]),
      };
    });
}

/**
 * As text that Plotly, which reads some tags, shows as it is.
 * @param {LoggedEvent} event
 */
export function eventLabel({ action, monitor, what }) {
  const label = Object.hasOwn(ACTIONS, action) ? ACTIONS[action][0] : action;
  const words = plainText(`${label}, ${monitor}: ${what}`).slice(0, 3 * WORDS_PER_LINE);
  const lines =
    words.match(new RegExp(`.{1,${WORDS_PER_LINE}}(?:\\s|$)|.{1,${WORDS_PER_LINE}}`, "gs")) ?? [];
  return lines
    .map((line) => line.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"))
    .join("<br>");
}
