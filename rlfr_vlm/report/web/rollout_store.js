// The rollouts of the page as far as they are unpacked, and what is chosen of them.

import { placed } from "./rollout_filters.js";
import { RUN } from "./run_data.js";
import { writeAddress } from "./tabs.js";
import { unpack } from "./unpack.js";

/** @import { ResponseTokens } from "./data" */
/** @import { Group, GroupMatch, Part, Quantity, RolloutSettings } from "./types" */

/**
 * The per-token quantities, what the ends of their scales mean, and which end is shaded.
 * @type {Record<Quantity, { label: string, low: string, high: string, reversed?: boolean }>}
 */
export const QUANTITIES = {
  flow_rewards: { label: "flow reward", low: "penalised", high: "rewarded" },
  deviations: { label: "deviation", low: "near the flow", high: "far" },
  logprobs: { label: "log-prob", low: "unlikely", high: "likely", reversed: true },
  advantages: { label: "advantage", low: "discouraged", high: "encouraged" },
  entropy: { label: "entropy", low: "certain", high: "open" },
};

/** Names of all quantities. */
export const quantities = () => /** @type {Quantity[]} */ (Object.keys(QUANTITIES));

/** @type {Quantity | ""} */
export const DEFAULT_SHADE = quantities().find((name) => name in RUN.rollouts.scales) || "";

/**
 * @type {{
 *   groups: Promise<Group[]> | null,
 *   steps: Map<number, Promise<ResponseTokens[][]>>,
 *   matches: GroupMatch[],
 *   page: number,
 *   drawing: number,
 *   shown: boolean,
 *   settings: RolloutSettings,
 * }}
 */
export const browser = {
  groups: null, // a promise of all groups
  steps: new Map(), // step -> a promise of the tokens of its groups
  matches: [],
  page: 0,
  drawing: 0,
  shown: false,
  settings: {
    step: String(RUN.rollouts.steps.at(-1)),
    responses: "all",
    groups: "all",
    search: "",
    shade: DEFAULT_SHADE,
    attention: "", // mean: shown while no token is pointed at
  },
};

/** @type {WeakMap<Part, ResponseTokens>} */
export const traces = new WeakMap(); // text element -> the tokens and traces it shows

/** @param {number} step */
export function stepTokens(step) {
  const known = browser.steps.get(step) ?? unpack(`rollout-step-${step}`);
  browser.steps.set(step, known);
  return known;
}

/** All groups. */
export function rolloutGroups() {
  browser.groups ??= unpack("rollout-index").then(placed);
  return browser.groups;
}

export function rememberSettings() {
  const { step, responses, groups, shade, search, attention } = browser.settings;
  writeAddress("rollouts", {
    step,
    responses: responses === "all" ? "" : responses,
    groups: groups === "all" ? "" : groups,
    shade,
    search,
    attention,
    page: browser.page ? browser.page + 1 : "",
  });
}
