"use strict";
// Helpers of both pages. Text from the files reaches a page only as text nodes and attributes that `h` sets.

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(typeof child === "string" ? visible(child) : child);
  }
  return node;
}

// Hidden characters show as their code points and can do nothing; `marked` puts signs before line breaks and tabs.
const HIDDEN_CHARACTERS = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;

function visible(text, marked = false) {
  if (!HIDDEN_CHARACTERS.test(text)) return text;
  const fragment = document.createDocumentFragment();
  for (const piece of text.split(new RegExp(`(${HIDDEN_CHARACTERS.source})`))) {
    if (piece === "\n") fragment.append(marked ? glyph("⏎") : "", "\n");
    else if (piece === "\t") fragment.append(marked ? glyph("⇥") : "", "\t");
    else if (piece.length === 1 && HIDDEN_CHARACTERS.test(piece))
      fragment.append(glyph(`U+${piece.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
    else fragment.append(piece);
  }
  return fragment;
}

function glyph(text) {
  return h("i", { class: "glyph" }, text);
}

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isNumber = (value) => typeof value === "number";
const count = (value) => value.toLocaleString("en-US");
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
const percent = (value) =>
  isNumber(value) ? `${value !== 0 && Math.abs(value) < 0.01 ? (100 * value).toPrecision(2) : (100 * value).toFixed(1)} %` : "–";

// Four significant digits with a real minus sign; `signed` puts a plus before positive values.
function figure(value, signed = false) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}

function duration(seconds) {
  if (seconds < 0.05) return "< 0.1 s";
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function median(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

const bounds = ({ low, high }) => `${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}`;

const CAN_UNPACK = "DecompressionStream" in window;

async function unpack(id) {
  const letters = atob(byId(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// What a reader should know about the files.
function problemPanel(run, missingTitle) {
  const lines = (kind) => run.problems.filter((problem) => problem.kind === kind);
  if (!run.problems.length) return null;
  const missing = lines("missing");
  return h(
    "div",
    { class: `notice ${lines("damaged").length ? "damaged" : ""}`, id: "problems" },
    lines("damaged").map((problem) => h("p", {}, h("b", {}, "Damaged: "), h("code", {}, problem.file), `: ${problem.text}.`)),
    lines("note").map((problem) => h("p", {}, h("b", {}, "Note: "), h("code", {}, problem.file), `: ${problem.text}.`)),
    missing.length > 0 && missingFiles(missing, missingTitle),
    run.numMoreProblems > 0 && h("p", {}, `… and ${plural(run.numMoreProblems, "more line")}.`),
  );
}

// Files that are not there, those with something to say each on a line.
function missingFiles(missing, title) {
  const plain = missing.filter(({ text }) => text === "not there");
  const telling = missing.filter(({ text }) => text !== "not there");
  const names = plain.map(({ file }, at) => [at ? ", " : "", h("code", {}, file)]);
  return [
    plain.length > 0 && h("p", {}, h("b", {}, title), names, "."),
    telling.length > 0 && [
      h("p", {}, h("b", {}, title.replace(/: $/, ":"))),
      h(
        "ul",
        {},
        telling.map(({ file, text }) => h("li", {}, h("code", {}, file), `: ${text}.`)),
      ),
    ],
  ];
}

// The question with a sign for every picture in it; none for a single one before the text.
function questionText({ question, images }) {
  const pieces = (images.length > 1 ? question : question.replace(/^<image>\s*/, "")).split("<image>");
  return pieces.map((piece, at) => [at > 0 && h("span", { class: "tag" }, images.length > 1 ? `picture ${at}` : "picture"), piece]);
}

function picture({ key, path, file }) {
  if (!key)
    return h("p", { class: "no-picture" }, file ? ["not on this page ", fileLink(file)] : ["picture not found", h("code", {}, path)]);
  const image = h("img", {
    src: byId(`picture-${key}`).textContent,
    alt: "picture of the question",
    title: "click to enlarge",
    onclick: enlarge,
    onload: fit,
  });
  return image;
}

// A file beside this page, by its relative path.
function fileLink(path) {
  const parts = path.split("/");
  if (parts.includes("..") || parts[0] === "") return h("code", {}, path);
  return h("a", { href: `./${parts.map(encodeURIComponent).join("/")}` }, h("code", {}, path));
}

// Small pictures are enlarged by a whole factor, so that their pixels stay square.
function fit(event) {
  const image = event.target;
  const times = Math.floor(200 / Math.max(image.naturalWidth, image.naturalHeight));
  if (times < 2) return;
  image.style.width = `${times * image.naturalWidth}px`;
  image.classList.add("pixels");
}

function enlarge(event) {
  const image = byId("lightbox").querySelector("img");
  image.src = event.target.src;
  image.classList.toggle("pixels", event.target.classList.contains("pixels"));
  byId("lightbox").showModal();
}

// What can become of a response. Only the first two are counted in an accuracy.
const OUTCOMES = {
  correct: ["✓", "correct", ""],
  wrong: ["✗", "wrong", ""],
  unjudged: ["?", "unjudged", "rules could not decide and there was nobody to ask"],
  failed: ["!", "failed", "the judge did not answer; asked again when the evaluation is resumed"],
  error: ["!", "error", "the grader could not read the answer within its limits"],
  pending: ["…", "not graded yet", "a response without a verdict"],
  unanswered: ["…", "no response yet", ""],
};
const UNCOUNTED = Object.keys(OUTCOMES).slice(2);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// Headline numbers, an accuracy never without what it leaves out. `link` makes the cell of a benchmark's name.
function benchmarkTable(benchmarks, link) {
  const some = (value) => benchmarks.some((benchmark) => isNumber(value(benchmark)));
  const ks = new Set(benchmarks.map(({ passAt }) => passAt?.[0]).filter(isNumber));
  const k = ks.size === 1 ? [...ks][0] : "k";
  const agreement = ({ agreement: [same, both] }) => (both ? same / both : null);
  const answered = ({ counts }) => sum(Object.values(counts)) - counts.unanswered;
  const columns = [
    ["Benchmark", "name", link],
    ["", "wide", verdictBar],
    ["Accuracy", "num strong", accuracyCell],
    ["95 % interval", "num", ({ accuracy }) => (accuracy ? bounds(accuracy) : "–")],
    ["Not counted", "num", uncountedCell],
    some(({ passAt }) => passAt?.[1]) && [`pass@${k}`, "num", ({ passAt }) => (passAt ? percent(passAt[1]) : "–")],
    some(({ majority }) => majority) && [`maj@${k}`, "num", ({ majority }) => percent(majority)],
    some(({ greedy }) => greedy) && ["Greedy", "num", ({ greedy }) => percent(greedy)],
    ["Truncated", "num", (benchmark) => (answered(benchmark) ? percent(benchmark.truncated / answered(benchmark)) : "–")],
    ["Mean length", "num", ({ meanLength }) => (isNumber(meanLength) ? `${count(Math.round(meanLength))} tokens` : "–")],
    some(agreement) && ["Rule = judge", "num", (benchmark) => percent(agreement(benchmark))],
  ].filter(Boolean);
  return h(
    "table",
    { class: "benchmarks" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        columns.map(([title, kind]) => h("th", { class: kind }, title)),
      ),
    ),
    h(
      "tbody",
      {},
      benchmarks.map((benchmark) =>
        h(
          "tr",
          {},
          columns.map(([title, kind, cell]) => h("td", { class: kind, "data-title": title || null }, cell(benchmark))),
        ),
      ),
    ),
  );
}

function accuracyCell({ accuracy, provisional, withheld }) {
  if (withheld) return h("span", { class: "cut", title: "too many responses have no verdict" }, "no score");
  if (!accuracy) return "–";
  return [
    percent(accuracy.value),
    provisional && h("small", { title: "counted from the ledger; the evaluation has not ended" }, " so far"),
  ];
}

function uncountedCell({ counts }) {
  const left = sum(UNCOUNTED.map((verdict) => counts[verdict]));
  if (!left) return "0";
  const parts = UNCOUNTED.filter((verdict) => counts[verdict]).map((verdict) => `${count(counts[verdict])} ${OUTCOMES[verdict][1]}`);
  return [h("b", { class: "cut" }, count(left)), ` of ${count(sum(Object.values(counts)))}`, h("small", {}, parts.join(", "))];
}

// The shares of all verdicts as one line.
function verdictBar({ counts }) {
  const bar = h("div", { class: "verdicts" });
  for (const [verdict, [, label]] of Object.entries(OUTCOMES)) {
    if (!counts[verdict]) continue;
    const part = h("i", { class: verdict, title: `${count(counts[verdict])} ${label}` });
    part.style.flexGrow = counts[verdict];
    bar.append(part);
  }
  return bar;
}
