// One problem: question, pictures and gold answers, and each response with the answer read from it,
// its verdict and the judge's words.

import { OUTCOMES } from "./benchmarks.js";
import { byId, h, part, visible } from "./dom.js";
import { EVALUATION } from "./evaluation_data.js";
import { address, browser, textsOf, writeAddress } from "./evaluation_store.js";
import { count, duration, isNumber, plural } from "./format.js";
import { drawRows, marks, openAt, scrollToRow } from "./list.js";
import { fileLink, picture, questionText } from "./shared.js";
import { answerRange, merged, pieces, ranges } from "./text_marks.js";

/** @import { JudgeData, SampleTexts } from "./data" */
/** @import { Child, EvaluatedProblem, Marked, PageEvent, Part, Range, Sample } from "./types" */

const SAMPLES_AT_FIRST = 8; // the rest on request

// Characters; a longer response shows its beginning, its end and what is looked for.
const FOLDED = 3200;

const [HEAD, TAIL, AROUND] = [1000, 1600, 300];

export async function drawProblem() {
  const problem = browser.open;
  const view = byId("problem");
  if (!problem) {
    view.replaceChildren();
    return;
  }
  const texts = await textsOf(problem);
  if (problem !== browser.open) return; // overtaken
  const shown =
    browser.matches.find((match) => match.problem === problem)?.shown ??
    problem.samples.map((_, at) => at);
  const named = problem.samples.findIndex(({ index }) => index === browser.sample);
  const first = [...new Set(named < 0 ? [] : [named]), ...shown.filter((at) => at !== named)]
    .slice(0, SAMPLES_AT_FIRST)
    .sort((a, b) => a - b);
  const samples = h(
    "div",
    { class: "samples" },
    first.map((at) => sampleCard(problem, problem.samples[at], texts[at])),
  );
  const rest = problem.samples.map((_, at) => at).filter((at) => !first.includes(at));
  const filtered = rest.filter((at) => !shown.includes(at)).length;
  const more = (/** @type {PageEvent} */ event) => {
    samples.append(...rest.map((at) => sampleCard(problem, problem.samples[at], texts[at])));
    event.target.remove();
  };
  const why = filtered
    ? ` (${filtered === rest.length ? "" : `${filtered} `}left out by the filters)`
    : "";
  view.replaceChildren(problemHeader(problem), samples);
  if (rest.length)
    view.append(
      h(
        "button",
        { class: "more", onclick: more },
        `show the other ${plural(rest.length, "response")}${why}`,
      ),
    );
  view.dataset.problem = problem.id;
  const target =
    named < 0 ? part(document, ".panes") : byId(`sample-${problem.samples[named].index}`);
  const top = target.getBoundingClientRect().top - (named < 0 ? 0 : 12) - stickyHeight();
  if (named >= 0 || top < 0) scrollBy(0, top);
}

const stickyHeight = () =>
  getComputedStyle(byId("filters")).position === "sticky" ? byId("filters").offsetHeight : 0;

/** @param {EvaluatedProblem} problem */
function problemHeader(problem) {
  const at = openAt();
  const left = problem.samples.length - problem.counted;
  const benchmark = EVALUATION.benchmarks[problem.benchmark];
  /**
   * @param {number} by
   * @param {string} sign
   * @param {string} label
   */
  const step = (by, sign, label) =>
    h(
      "button",
      {
        "aria-label": label,
        title: `${label} (${by > 0 ? "→ or j" : "← or k"})`,
        disabled: !browser.matches[at + by],
        onclick: () => turn(by),
      },
      sign,
    );
  const [question, golds] = [markedParts(questionText(problem)), problem.golds];
  return h(
    "div",
    { class: `card asked ${problem.images.length ? "pictured" : ""}` },
    h(
      "div",
      { class: "bar heading" },
      h("button", { class: "link back", onclick: leave }, "‹ all problems"),
      h(
        "p",
        { class: "meta" },
        h("a", { href: address(problem), class: "name" }, problem.id),
        EVALUATION.benchmarks.length > 1 && h("span", {}, benchmark.title),
        problem.source && problem.source !== benchmark.name && h("span", {}, problem.source),
      ),
      h("span", { class: "gap" }),
      h(
        "div",
        { class: "pager" },
        h(
          "span",
          { class: "where" },
          at < 0 ? "filtered out" : `${count(at + 1)} / ${count(browser.matches.length)}`,
        ),
        step(-1, "‹", "previous problem"),
        step(1, "›", "next problem"),
      ),
    ),
    problem.images.length > 0 && h("div", { class: "pictures" }, problem.images.map(picture)),
    h(
      "div",
      { class: "task" },
      h(
        "p",
        { class: "question", dir: "auto" },
        problem.question ? question : h("i", {}, "The question is not in problems.jsonl."),
      ),
      h(
        "p",
        { class: "gold" },
        h("span", {}, golds.length > 1 ? "gold answers" : "gold answer"),
        golds.length
          ? golds.map((gold, number) => [number > 0 && h("span", {}, " or "), h("b", {}, gold)])
          : "–",
      ),
      h(
        "p",
        { class: "meta tally" },
        marks(problem),
        h(
          "span",
          {},
          `${problem.right} of ${problem.counted} right`,
          left > 0 && [", ", h("span", { class: "cut" }, `${left} not counted`)],
        ),
      ),
    ),
  );
}

/**
 * Strings among the parts with their formulas and search hits marked.
 * @param {Child[]} parts
 * @returns {Child[]}
 */
function markedParts(parts) {
  const flat = /** @type {Child[]} */ (/** @type {unknown[]} */ (parts).flat(Infinity));
  return flat.map((part) =>
    typeof part === "string"
      ? h("span", {}, marked(part, 0, part.length, ranges(part, browser.settings.search)))
      : part,
  );
}

function leave() {
  browser.open = null;
  document.body.removeAttribute("data-reading");
  writeAddress();
  scrollTo(0, 0);
  drawRows();
}

/** @param {number} by */
export function turn(by) {
  const match = browser.matches[Math.max(0, openAt() + by)];
  if (!match || match.problem === browser.open) return;
  browser.open = match.problem;
  browser.sample = null;
  writeAddress();
  scrollToRow();
  drawRows();
  drawProblem();
}

/**
 * @param {EvaluatedProblem} problem
 * @param {Sample} sample
 * @param {SampleTexts} texts
 */
function sampleCard(problem, sample, { response = [], left = 0, reply = "", judge = [] }) {
  const [sign, label, title] = OUTCOMES[sample.verdict];
  const cut = sample.finish === "length";
  const says = (/** @type {string} */ who, /** @type {string | undefined} */ verdict) =>
    verdict && h("span", { class: `says ${verdict}` }, `${who} `, h("b", {}, verdict));
  const text = h("div", { class: "text", dir: "auto" });
  if (response.length) fillResponse(text, problem, response, left, sample.prediction ?? "");
  const decided = sample.verdict !== "pending" && sample.verdict !== "unanswered";
  return h(
    "section",
    { class: `response ${sample.verdict}`, id: `sample-${sample.index}` },
    h(
      "header",
      {},
      h("span", { class: "badge", title: title || null }, `${sign} ${label}`),
      decided &&
        h(
          "span",
          { class: "read" },
          sample.prediction ? ["read as ", h("b", {}, sample.prediction)] : "no answer found",
        ),
      (sample.judge || sample.disagreement) && [
        says("rule", sample.rule),
        says("judge", sample.judge?.verdict),
      ],
      sample.disagreement && h("span", { class: "cut" }, "rule ≠ judge"),
      h("span", { class: "gap" }),
      h(
        "a",
        {
          href: address(problem, sample.index),
          class: "name",
          title: "the address of this response",
        },
        `sample ${sample.index}`,
      ),
    ),
    sample.reason && h("p", { class: "reason" }, sample.reason),
    response.length > 0 && text,
    sample.judge && judgeWords(sample.judge, reply, judge),
    response.length > 0 &&
      h(
        "footer",
        {},
        h(
          "span",
          { class: cut ? "cut" : "" },
          [
            isNumber(sample.tokens) && plural(sample.tokens, "token"),
            cut ? "truncated" : sample.finish,
          ]
            .filter(Boolean)
            .join(", "),
        ),
        isNumber(sample.promptTokens) &&
          h("span", {}, `prompt ${plural(sample.promptTokens, "token")}`),
        isNumber(sample.seconds) && h("span", {}, duration(sample.seconds)),
      ),
  );
}

/**
 * @param {JudgeData} judge
 * @param {string} reply
 * @param {[string, string][]} settings
 */
function judgeWords({ verdict, model, attempts, seconds }, reply, settings) {
  return h(
    "div",
    { class: "judge" },
    h(
      "p",
      { class: "meta" },
      h("span", {}, "judge ", model && h("b", {}, model)),
      isNumber(attempts) && attempts > 1 && h("span", {}, plural(attempts, "attempt")),
      isNumber(seconds) && seconds > 0 && h("span", {}, duration(seconds)),
    ),
    reply
      ? h("blockquote", {}, reply)
      : h(
          "p",
          { class: "hint" },
          verdict === "failed" ? "The judge did not answer." : "No words of the judge were kept.",
        ),
    settings.length > 0 &&
      h(
        "details",
        {},
        h("summary", {}, "settings"),
        h(
          "table",
          {},
          h(
            "tbody",
            {},
            settings.map(([key, value]) => h("tr", {}, h("td", {}, key), h("td", {}, value))),
          ),
        ),
      ),
  );
}

/**
 * @param {Part} element
 * @param {EvaluatedProblem} problem
 * @param {string[]} parts
 * @param {number} left
 * @param {string} prediction
 */
function fillResponse(element, problem, parts, left, prediction) {
  const text = parts.join("");
  const answer = answerRange(text, prediction);
  const all = ranges(text, browser.settings.search, answer);
  const hit = all.find(({ kind }) => kind === "hit");
  /** @type {(Range | null | undefined)[]} */
  const wanted = [
    [0, HEAD],
    [text.length - TAIL, text.length],
    answer && [answer.from - AROUND, answer.to + AROUND],
    hit && [hit.from - AROUND, hit.to + AROUND],
  ];
  /** @type {Range[]} */
  const windows =
    text.length <= FOLDED
      ? [[0, text.length]]
      : merged(
          wanted.flatMap((each) => (each ? [each] : [])),
          text,
        );
  const missing = parts[0].length; // where the page itself leaves something out
  let end = 0;
  const between = (/** @type {number} */ from, /** @type {number} */ to) => {
    const unfold = (/** @type {PageEvent} */ event) =>
      event.target.replaceWith(...stretch(from, to));
    if (to > from)
      element.append(
        h("button", { class: "more", onclick: unfold }, `… ${plural(to - from, "character")} …`),
      );
  };
  const file = EVALUATION.benchmarks[problem.benchmark].folder;
  const stretch = (/** @type {number} */ from, /** @type {number} */ to) => {
    if (!left || missing < from || missing >= to) return marked(text, from, to, all);
    const gap = h(
      "span",
      { class: "left-out" },
      `${plural(left, "character")} only in `,
      fileLink(`${file === "." ? "" : `${file}/`}ledger.jsonl`),
    );
    return [...marked(text, from, missing, all), gap, ...marked(text, missing, to, all)];
  };
  for (const [from, to] of windows) {
    between(end, from);
    element.append(...stretch(from, to));
    end = to;
  }
}

/**
 * Nodes of text[from, to), marked.
 * @param {string} text
 * @param {number} from
 * @param {number} to
 * @param {Marked[]} all
 */
function marked(text, from, to, all) {
  return pieces(from, to, all).map(({ from, to, kinds }) => {
    const piece = text.slice(from, to);
    if (!kinds.length) return visible(piece);
    const tag = kinds.includes("answer") || kinds.includes("hit") ? "mark" : "span";
    return h(tag, { class: kinds.join(" ") }, piece);
  });
}
