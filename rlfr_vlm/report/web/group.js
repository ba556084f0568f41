// One group: its pictures and question, and its responses as tokens, side by side.

import { attributable } from "./attribution.js";
import { byId, glyph, h, visible } from "./dom.js";
import { figure, plural } from "./format.js";
import { searchHits } from "./rollout_filters.js";
import { browser, traces } from "./rollout_store.js";
import { shadeText, showTooltip } from "./shading.js";
import { picture, questionText } from "./shared.js";

/** @import { ResponseTokens } from "./data" */
/** @import { Group, Part, Response } from "./types" */

const TOKENS_AT_FIRST = 400; // of a response; the rest on request

/** @type {Record<string, string>} */
const VERDICTS = { correct: "✓ correct", wrong: "✗ wrong", error: "? not graded" };

/**
 * @param {Group} group
 * @param {number[]} shown
 * @param {ResponseTokens[]} tokens
 */
export function groupCard(group, shown, tokens) {
  const total = group.responses.length;
  const siblings = h(
    "div",
    { class: "siblings" },
    shown.map((at) => responseCard(group.responses[at], tokens[at])),
  );
  const rest = group.responses.map((_, at) => at).filter((at) => !shown.includes(at));
  const more =
    rest.length > 0 &&
    h(
      "button",
      {
        class: "more",
        onclick: (event) => {
          siblings.append(...rest.map((at) => responseCard(group.responses[at], tokens[at])));
          event.target.remove();
        },
      },
      `show the other ${plural(rest.length, "sibling")}`,
    );
  const card = h(
    "article",
    { class: "card group" },
    h(
      "header",
      {},
      group.images.length > 0 && h("div", { class: "pictures" }, group.images.map(picture)),
      h(
        "div",
        { class: "task" },
        h(
          "p",
          { class: "meta" },
          `step ${group.step}`,
          group.source && h("span", {}, group.source),
          h("span", {}, group.id),
          tallyMarks(group),
          `${group.right} of ${total} correct`,
        ),
        h("p", { class: "question" }, questionText(group)),
        h("p", { class: "gold" }, h("span", {}, "gold answer"), h("b", {}, group.answer)),
      ),
    ),
    siblings,
    more,
  );
  return attributable(card, tokens);
}

/** @param {Response} response */
function verdictClass(response) {
  return Object.hasOwn(VERDICTS, response.verdict) ? response.verdict : "error";
}

/** @param {Group} group */
function tallyMarks(group) {
  return h(
    "span",
    { class: "marks", "aria-hidden": "true" },
    group.responses.map((response) => h("i", { class: verdictClass(response) })),
  );
}

/**
 * @param {Response} response
 * @param {ResponseTokens} trace
 */
function responseCard(response, trace) {
  const parts = Object.entries(response.parts)
    .map(([name, value]) => `${name} ${figure(value)}`)
    .join(", ");
  /**
   * @param {string} label
   * @param {string} value
   * @param {string | null} title
   */
  const number = (label, value, title) =>
    value !== "–" && h("span", { title }, `${label} `, h("b", {}, value));
  const text = h("div", { class: "text", dir: "auto" });
  fillText(text, response, trace, TOKENS_AT_FIRST);
  const version =
    response.version === null ? "" : `, sampled by policy version ${response.version}`;
  return h(
    "section",
    { class: `response ${verdictClass(response)}` },
    h(
      "header",
      { title: `response ${response.index ?? ""} of its group${version}` },
      h(
        "span",
        { class: "badge", title: response.reason || null },
        Object.hasOwn(VERDICTS, response.verdict)
          ? VERDICTS[response.verdict]
          : `? ${response.verdict || "no verdict"}`,
      ),
      number("reward", figure(response.reward), parts || null),
      number("advantage", figure(response.advantage, true), "mean over the tokens"),
    ),
    text,
    h(
      "footer",
      {},
      response.prediction !== "" &&
        h(
          "span",
          { title: "the answer as the grader read it" },
          "read as ",
          h("b", {}, response.prediction),
        ),
      h(
        "span",
        { class: response.finish === "length" ? "cut" : "" },
        [
          plural(response.numTokens, "token"),
          response.finish === "length" ? "truncated" : response.finish,
        ]
          .filter(Boolean)
          .join(", "),
      ),
      response.flowReward !== null &&
        number(
          "flow",
          figure(response.flowReward, true),
          `sum over ${plural(response.numFlowTokens, "token")} with a flow reward`,
        ),
    ),
  );
}

/**
 * @param {Part} element
 * @param {Response} response
 * @param {ResponseTokens | undefined} trace
 * @param {number} limit
 */
function fillText(element, response, trace, limit) {
  if (!trace || !trace.tokens.length) {
    element.replaceChildren(visible(response.text));
    return;
  }
  traces.set(element, trace);
  if (trace.attention) element.tabIndex = 0; // arrow keys go from token to token
  const hits = searchHits(trace.tokens, browser.settings.search);
  const shown = Math.min(limit, trace.tokens.length);
  const nodes = [];
  for (let at = 0; at < shown; at++) {
    const node = document.createElement("span");
    node.className = hits.has(at) ? "token hit" : "token";
    node.dataset.at = String(at);
    node.append(visibleToken(trace.tokens[at]));
    nodes.push(node);
  }
  if (shown < trace.tokens.length) {
    nodes.push(
      h(
        "button",
        { class: "more", onclick: () => fillText(element, response, trace, Infinity) },
        `show the other ${plural(trace.tokens.length - shown, "token")}`,
      ),
    );
  }
  element.replaceChildren(...nodes);
  shadeText(element);
  element.onpointerover = /** @type {(event: any) => void} */ (showTooltip);
  element.onpointerleave = () => {
    byId("tooltip").hidden = true;
  };
}

/**
 * A token that is nothing but white space gets signs.
 * @param {string} token
 */
function visibleToken(token) {
  if (token === "") return glyph("∅");
  if (/^ +$/.test(token)) return glyph("␣".repeat(token.length));
  return visible(token, true);
}
