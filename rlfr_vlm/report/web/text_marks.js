// What is marked in a response: formulas, what is searched for, the answer that was read.

/** @import { Marked, Range } from "./types" */

const TEX = /\$\$[^$]+?\$\$|\$(?=\S)[^$\n]*?[^\s$]\$(?!\d)|\\\([\s\S]+?\\\)|\\\[[\s\S]+?\\\]/g;

/**
 * Windows in order, joined where little lies between them; none begins or ends within a word.
 * @param {Range[]} windows
 * @param {string} text
 */
export function merged(windows, text) {
  const inside = (/** @type {number} */ at) => Math.min(text.length, Math.max(0, at));
  const snap = (/** @type {number} */ at) => {
    const space = text.slice(at, at + 60).search(/\s/);
    if (at <= 0 || at >= text.length) return at;
    return space >= 0 ? at + space : at + (/[\udc00-\udfff]/.test(text[at]) ? 1 : 0);
  };
  /** @type {Range[]} */
  const result = [];
  const snapped = windows.map(([from, to]) => [snap(inside(from)), snap(inside(to))]);
  for (const [from, to] of snapped.sort((a, b) => a[0] - b[0])) {
    const last = result.at(-1);
    if (last && from - last[1] < 200) last[1] = Math.max(last[1], to);
    else result.push([from, to]);
  }
  return result;
}

/**
 * What is marked in a text: formulas, what is searched for, the answer.
 * @param {string} text
 * @param {string} search
 * @param {{ from: number, to: number } | null} answer
 * @returns {Marked[]}
 */
export function ranges(text, search, answer = null) {
  /** @type {Marked[]} */
  const found = [...text.matchAll(TEX)].map((match) => ({
    kind: "tex",
    from: match.index,
    to: match.index + match[0].length,
  }));
  const wanted = search.trim().toLowerCase();
  const lower = text.toLowerCase();
  if (wanted && lower.length === text.length)
    for (
      let from = lower.indexOf(wanted);
      from >= 0;
      from = lower.indexOf(wanted, from + wanted.length)
    )
      found.push({ kind: "hit", from, to: from + wanted.length });
  if (answer) found.push({ kind: "answer", ...answer });
  return found;
}

/**
 * Pieces of text[from, to), each with the kinds of what is marked in it.
 * @param {number} from
 * @param {number} to
 * @param {Marked[]} all
 */
export function pieces(from, to, all) {
  const inside = all
    .filter((range) => range.from < to && range.to > from)
    .sort((a, b) => a.from - b.from);
  const cuts = [...new Set([from, to, ...inside.flatMap((range) => [range.from, range.to])])]
    .filter((at) => at >= from && at <= to)
    .sort((a, b) => a - b);
  const found = [];
  let start = 0;
  for (let at = 0; at + 1 < cuts.length; at++) {
    while (start < inside.length && inside[start].to <= cuts[at] && inside[start].kind === "tex")
      start++;
    const kinds = [];
    for (let number = start; number < inside.length && inside[number].from <= cuts[at]; number++)
      if (inside[number].to > cuts[at]) kinds.push(inside[number].kind);
    found.push({ from: cuts[at], to: cuts[at + 1], kinds });
  }
  return found;
}

/**
 * Where the answer that was read stands: in the last box or answer tag that holds it, else where it
 * occurs last.
 * @param {string} text
 * @param {string} prediction
 */
export function answerRange(text, prediction) {
  const wanted = prediction.trim();
  if (!wanted) return null;
  for (const [from, to] of [...boxes(text), ...tags(text)]) {
    const at = text.slice(from, to).lastIndexOf(wanted);
    if (at >= 0) return { from: from + at, to: from + at + wanted.length };
    if (bare(text.slice(from, to)) === bare(wanted)) return { from, to };
  }
  for (
    let at = text.lastIndexOf(wanted);
    at >= 0;
    at = at ? text.lastIndexOf(wanted, at - 1) : -1
  ) {
    const [before, after] = [text[at - 1] ?? " ", text[at + wanted.length] ?? " "];
    if (
      !(/[\p{L}\d]/u.test(before) && /[\p{L}\d]/u.test(wanted[0])) &&
      !(/[\p{L}\d]/u.test(after) && /[\p{L}\d]/u.test(wanted.slice(-1)))
    )
      return { from: at, to: at + wanted.length };
  }
  return null;
}

const bare = (/** @type {string} */ text) =>
  text.replace(/\s|\$|\\[!,;: ]|\\left|\\right/g, "").replace(/\\[dt]frac/g, "\\frac");

/**
 * The insides of \boxed{} and \fbox{}, the last one first.
 * @param {string} text
 * @returns {Range[]}
 */
function boxes(text) {
  /** @type {Range[]} */
  const found = [];
  for (const match of text.matchAll(/\\(?:boxed|fbox)\s*\{/g)) {
    const from = match.index + match[0].length;
    let depth = 1;
    let at = from;
    for (; at < text.length && at < from + 2000 && depth; at++) {
      if (text[at] === "\\") at++;
      else if (text[at] === "{") depth++;
      else if (text[at] === "}") depth--;
    }
    if (!depth) found.push([from, at - 1]);
  }
  return found.reverse();
}

/**
 * @param {string} text
 * @returns {Range[]}
 */
function tags(text) {
  /** @type {Range[]} */
  const found = [...text.matchAll(/<answer>([\s\S]*?)<\/answer>/g)].map((match) => [
    match.index + 8,
    match.index + 8 + match[1].length,
  ]);
  return found.reverse();
}
