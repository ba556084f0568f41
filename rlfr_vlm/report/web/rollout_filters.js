// Which rollouts pass the filters.

/** @import { GroupHead } from "./data" */
/** @import { Group, GroupMatch, Response, RolloutSettings } from "./types" */

/** @type {Record<string, [string, (response: Response) => boolean]>} */
export const RESPONSE_FILTERS = {
  all: ["all responses", () => true],
  correct: ["correct", (response) => response.verdict === "correct"],
  wrong: ["wrong", (response) => response.verdict === "wrong"],
  error: [
    "not graded",
    (response) => response.verdict !== "correct" && response.verdict !== "wrong",
  ],
  truncated: ["truncated", (response) => response.finish === "length"],
  flow: ["with a flow reward", (response) => response.numFlowTokens > 0],
};

/** @type {Record<string, [string, (right: number, total: number) => boolean]>} */
export const GROUP_FILTERS = {
  all: ["all groups", () => true],
  mixed: ["right and wrong", (right, total) => right > 0 && right < total],
  right: ["all right", (right, total) => right === total],
  wrong: ["none right", (right) => right === 0],
};

/**
 * Groups with their number of right responses, and their places among their step's tokens.
 * @param {GroupHead[]} heads steps one after the other
 * @returns {Group[]}
 */
export function placed(heads) {
  let [step, next] = [NaN, 0];
  return heads.map((head) => {
    if (head.step !== step) [step, next] = [head.step, 0];
    const right = head.responses.filter(({ verdict }) => verdict === "correct").length;
    return { ...head, at: next++, right };
  });
}

/**
 * Which groups, and which of their responses, pass.
 * @param {Group[]} all
 * @param {RolloutSettings} settings
 * @returns {GroupMatch[]}
 */
export function matching(all, { step, responses, groups, search }) {
  const [, wantsResponse] = RESPONSE_FILTERS[responses];
  const [, wantsGroup] = GROUP_FILTERS[groups];
  const text = search.trim().toLowerCase();
  const matches = [];
  for (const group of all) {
    if (step !== "all" && group.step !== Number(step)) continue;
    if (!wantsGroup(group.right, group.responses.length)) continue;
    const found =
      !text ||
      (group.searchable ??=
        `${group.question}\n${group.answer}\n${group.id}\n${group.source}`.toLowerCase()).includes(
        text,
      );
    /** @type {number[]} */
    const shown = [];
    group.responses.forEach((response, at) => {
      if (
        wantsResponse(response) &&
        (found ||
          (response.searchable ??=
            `${response.text}\n${response.prediction}`.toLowerCase()).includes(text))
      )
        shown.push(at);
    });
    if (shown.length) matches.push({ group, shown });
  }
  return matches;
}

/**
 * Positions of the tokens in which the searched text occurs.
 * @param {string[]} tokens
 * @param {string} search
 */
export function searchHits(tokens, search) {
  /** @type {Set<number>} */
  const hits = new Set();
  const text = search.trim().toLowerCase();
  if (!text) return hits;
  /** @type {number[]} */
  const starts = [];
  let joined = "";
  for (const token of tokens) {
    starts.push(joined.length);
    joined += token.toLowerCase();
  }
  starts.push(joined.length);
  for (
    let from = joined.indexOf(text);
    from >= 0;
    from = joined.indexOf(text, from + text.length)
  ) {
    for (let at = 0; at < tokens.length; at++)
      if (starts[at] < from + text.length && starts[at + 1] > from) hits.add(at);
  }
  return hits;
}
