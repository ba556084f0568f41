// One problem: question, pictures and gold answers, and each response with the answer read from it, its verdict and the judge's words.

const SAMPLES_AT_FIRST = 8; // the rest on request
const FOLDED = 3200; // characters; a longer response shows its beginning, its end and what is looked for
const [HEAD, TAIL, AROUND] = [1000, 1600, 300];
const TEX = /\$\$[^$]+?\$\$|\$(?=\S)[^$\n]*?[^\s$]\$(?!\d)|\\\([\s\S]+?\\\)|\\\[[\s\S]+?\\\]/g;

async function drawProblem() {
  const problem = browser.open;
  const view = byId("problem");
  if (!problem) {
    view.replaceChildren();
    return;
  }
  const texts = await textsOf(problem);
  if (problem !== browser.open) return; // overtaken
  const shown = browser.matches.find((match) => match.problem === problem)?.shown ?? problem.samples.map((_, at) => at);
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
  const more = (event) => {
    samples.append(...rest.map((at) => sampleCard(problem, problem.samples[at], texts[at])));
    event.target.remove();
  };
  const why = filtered ? ` (${filtered === rest.length ? "" : `${filtered} `}left out by the filters)` : "";
  view.replaceChildren(problemHeader(problem), samples);
  if (rest.length) view.append(h("button", { class: "more", onclick: more }, `show the other ${plural(rest.length, "response")}${why}`));
  view.dataset.problem = problem.id;
  const target = named < 0 ? document.querySelector(".panes") : byId(`sample-${problem.samples[named].index}`);
  const top = target.getBoundingClientRect().top - (named < 0 ? 0 : 12) - stickyHeight();
  if (named >= 0 || top < 0) scrollBy(0, top);
}

const stickyHeight = () => (getComputedStyle(byId("filters")).position === "sticky" ? byId("filters").offsetHeight : 0);

function problemHeader(problem) {
  const at = openAt();
  const left = problem.samples.length - problem.counted;
  const benchmark = EVALUATION.benchmarks[problem.benchmark];
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
  const [question, golds] = [pieces(questionText(problem)), problem.golds];
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
        h("span", { class: "where" }, at < 0 ? "filtered out" : `${count(at + 1)} / ${count(browser.matches.length)}`),
        step(-1, "‹", "previous problem"),
        step(1, "›", "next problem"),
      ),
    ),
    problem.images.length > 0 && h("div", { class: "pictures" }, problem.images.map(picture)),
    h(
      "div",
      { class: "task" },
      h("p", { class: "question", dir: "auto" }, problem.question ? question : h("i", {}, "The question is not in problems.jsonl.")),
      h(
        "p",
        { class: "gold" },
        h("span", {}, golds.length > 1 ? "gold answers" : "gold answer"),
        golds.length ? golds.map((gold, number) => [number > 0 && h("span", {}, " or "), h("b", {}, gold)]) : "–",
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

// Strings among the pieces with their formulas and search hits marked.
function pieces(parts) {
  return parts.flat(Infinity).map((part) => (typeof part === "string" ? h("span", {}, marked(part, 0, part.length, ranges(part))) : part));
}

function leave() {
  browser.open = null;
  document.body.removeAttribute("data-reading");
  writeAddress();
  scrollTo(0, 0);
  drawRows();
}

function sampleCard(problem, sample, { response = [], left = 0, reply = "", judge = [] }) {
  const [sign, label, title] = OUTCOMES[sample.verdict];
  const cut = sample.finish === "length";
  const says = (who, verdict) => verdict && h("span", { class: `says ${verdict}` }, `${who} `, h("b", {}, verdict));
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
      decided && h("span", { class: "read" }, sample.prediction ? ["read as ", h("b", {}, sample.prediction)] : "no answer found"),
      (sample.judge || sample.disagreement) && [says("rule", sample.rule), says("judge", sample.judge?.verdict)],
      sample.disagreement && h("span", { class: "cut" }, "rule ≠ judge"),
      h("span", { class: "gap" }),
      h("a", { href: address(problem, sample.index), class: "name", title: "the address of this response" }, `sample ${sample.index}`),
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
          [isNumber(sample.tokens) && plural(sample.tokens, "token"), cut ? "truncated" : sample.finish].filter(Boolean).join(", "),
        ),
        isNumber(sample.promptTokens) && h("span", {}, `prompt ${plural(sample.promptTokens, "token")}`),
        isNumber(sample.seconds) && h("span", {}, duration(sample.seconds)),
      ),
  );
}

function judgeWords({ verdict, model, attempts, seconds }, reply, settings) {
  return h(
    "div",
    { class: "judge" },
    h(
      "p",
      { class: "meta" },
      h("span", {}, "judge ", model && h("b", {}, model)),
      attempts > 1 && h("span", {}, plural(attempts, "attempt")),
      seconds > 0 && h("span", {}, duration(seconds)),
    ),
    reply
      ? h("blockquote", {}, reply)
      : h("p", { class: "hint" }, verdict === "failed" ? "The judge did not answer." : "No words of the judge were kept."),
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

// Responses.

function fillResponse(element, problem, parts, left, prediction) {
  const text = parts.join("");
  const answer = answerRange(text, prediction);
  const all = ranges(text, answer);
  const hit = all.find(({ kind }) => kind === "hit");
  const wanted = [
    [0, HEAD],
    [text.length - TAIL, text.length],
    answer && [answer.from - AROUND, answer.to + AROUND],
    hit && [hit.from - AROUND, hit.to + AROUND],
  ];
  const windows = text.length <= FOLDED ? [[0, text.length]] : merged(wanted.filter(Boolean), text);
  const missing = parts[0].length; // where the page itself leaves something out
  let end = 0;
  const between = (from, to) => {
    const unfold = (event) => event.target.replaceWith(...stretch(from, to));
    if (to > from) element.append(h("button", { class: "more", onclick: unfold }, `… ${plural(to - from, "character")} …`));
  };
  const file = EVALUATION.benchmarks[problem.benchmark].folder;
  const stretch = (from, to) => {
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

// Windows in order, joined where little lies between them; none begins or ends within a word.
function merged(windows, text) {
  const inside = (at) => Math.min(text.length, Math.max(0, at));
  const snap = (at) => {
    const space = text.slice(at, at + 60).search(/\s/);
    if (at <= 0 || at >= text.length) return at;
    return space >= 0 ? at + space : at + (/[\udc00-\udfff]/.test(text[at]) ? 1 : 0);
  };
  const result = [];
  for (const [from, to] of windows.map(([from, to]) => [snap(inside(from)), snap(inside(to))]).sort((a, b) => a[0] - b[0])) {
    const last = result.at(-1);
    if (last && from - last[1] < 200) last[1] = Math.max(last[1], to);
    else result.push([from, to]);
  }
  return result;
}

// What is marked in a text: formulas, what is searched for, the answer.
function ranges(text, answer = null) {
  const found = [...text.matchAll(TEX)].map((match) => ({ kind: "tex", from: match.index, to: match.index + match[0].length }));
  const search = browser.settings.search.trim().toLowerCase();
  const lower = text.toLowerCase();
  if (search && lower.length === text.length)
    for (let from = lower.indexOf(search); from >= 0; from = lower.indexOf(search, from + search.length))
      found.push({ kind: "hit", from, to: from + search.length });
  if (answer) found.push({ kind: "answer", ...answer });
  return found;
}

// Nodes of text[from, to), marked.
function marked(text, from, to, all) {
  const inside = all.filter((range) => range.from < to && range.to > from).sort((a, b) => a.from - b.from);
  const cuts = [...new Set([from, to, ...inside.flatMap((range) => [range.from, range.to])])]
    .filter((at) => at >= from && at <= to)
    .sort((a, b) => a - b);
  const nodes = [];
  let start = 0;
  for (let at = 0; at + 1 < cuts.length; at++) {
    while (start < inside.length && inside[start].to <= cuts[at] && inside[start].kind === "tex") start++;
    const kinds = [];
    for (let number = start; number < inside.length && inside[number].from <= cuts[at]; number++)
      if (inside[number].to > cuts[at]) kinds.push(inside[number].kind);
    const piece = text.slice(cuts[at], cuts[at + 1]);
    nodes.push(
      kinds.length
        ? h(kinds.includes("answer") || kinds.includes("hit") ? "mark" : "span", { class: kinds.join(" ") }, piece)
        : visible(piece),
    );
  }
  return nodes;
}

// Where the answer that was read stands: in the last box or answer tag that holds it, else where it occurs last.
function answerRange(text, prediction) {
  const wanted = prediction.trim();
  if (!wanted) return null;
  for (const [from, to] of [...boxes(text), ...tags(text)]) {
    const at = text.slice(from, to).lastIndexOf(wanted);
    if (at >= 0) return { from: from + at, to: from + at + wanted.length };
    if (bare(text.slice(from, to)) === bare(wanted)) return { from, to };
  }
  for (let at = text.lastIndexOf(wanted); at >= 0; at = at ? text.lastIndexOf(wanted, at - 1) : -1) {
    const [before, after] = [text[at - 1] ?? " ", text[at + wanted.length] ?? " "];
    if (!(/[\p{L}\d]/u.test(before) && /[\p{L}\d]/u.test(wanted[0])) && !(/[\p{L}\d]/u.test(after) && /[\p{L}\d]/u.test(wanted.at(-1))))
      return { from: at, to: at + wanted.length };
  }
  return null;
}

const bare = (text) => text.replace(/\s|\$|\\[!,;: ]|\\left|\\right/g, "").replace(/\\[dt]frac/g, "\\frac");

// The insides of \boxed{} and \fbox{}, the last one first.
function boxes(text) {
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

function tags(text) {
  return [...text.matchAll(/<answer>([\s\S]*?)<\/answer>/g)].map((match) => [match.index + 8, match.index + 8 + match[1].length]).reverse();
}
