// The page of an evaluation: its numbers, what is shown of it, and the address that says so.

const EVALUATION = JSON.parse(byId("evaluation-data").textContent);

// What samples are filtered by: the values that a sample has. Any of the chosen values will do, or, with `every`, it takes all of them.
const FACETS = {
  benchmark: { of: (sample, problem) => [EVALUATION.benchmarks[problem.benchmark].name] },
  verdict: { of: (sample) => [sample.verdict] },
  only: { of: (sample) => sample.traits, every: true },
  source: { of: (sample, problem) => [problem.source ?? ""] },
};
const TRAITS = {
  truncated: ["truncated", "cut at the token limit"],
  disagreement: ["rule ≠ judge", "rule and judge decided differently"],
  unread: ["no answer found", "no answer could be extracted"],
};
const ORDERS = {
  file: ["in order", null],
  hardest: ["least right first", (a, b) => share(a) - share(b)],
  easiest: ["most right first", (a, b) => share(b) - share(a)],
  longest: ["longest first", (a, b) => longest(b) - longest(a)],
};
const share = ({ right, counted }) => (counted ? right / counted : -0.5);
const longest = ({ samples }) => Math.max(0, ...samples.map(({ tokens }) => tokens ?? 0));

const browser = {
  problems: [],
  chunks: new Map(), // number -> a promise of the texts of its problems
  matches: [], // {problem, shown: places of the samples that pass}
  open: null, // the problem shown
  sample: null, // the sample that the address names
  drawing: 0,
  settings: { benchmark: new Set(), verdict: new Set(), only: new Set(), source: new Set(), search: "", order: "file" },
};

// The texts of a problem's samples.
async function textsOf(problem) {
  if (!browser.chunks.has(problem.chunk)) browser.chunks.set(problem.chunk, unpack(`responses-${problem.chunk}`));
  return (await browser.chunks.get(problem.chunk))[problem.at];
}

// What the filters ask of each problem and sample, found once.
function prepare(problem) {
  const samples = problem.samples;
  problem.right = samples.filter(({ verdict }) => verdict === "correct").length;
  problem.counted = samples.filter(({ verdict }) => !UNCOUNTED.includes(verdict)).length;
  for (const sample of samples) {
    const decided = (verdict) => verdict === "correct" || verdict === "wrong";
    sample.disagreement = decided(sample.rule) && decided(sample.judge?.verdict) && sample.rule !== sample.judge.verdict;
    const answered = sample.verdict !== "unanswered" && sample.verdict !== "pending";
    sample.traits = [
      sample.finish === "length" && "truncated",
      sample.disagreement && "disagreement",
      answered && !sample.prediction && "unread",
    ].filter(Boolean);
  }
}

// The address: #benchmark/problem?verdict=wrong&only=truncated&sample=2
function address(problem, sample) {
  const { settings } = browser;
  const parameters = new URLSearchParams();
  for (const facet of Object.keys(FACETS)) for (const value of settings[facet]) parameters.append(facet, value);
  if (settings.search.trim()) parameters.set("search", settings.search.trim());
  if (settings.order !== "file") parameters.set("order", settings.order);
  if (sample !== undefined) parameters.set("sample", sample);
  const place = problem ? `${encodeURIComponent(EVALUATION.benchmarks[problem.benchmark].name)}/${encodeURIComponent(problem.id)}` : "";
  const text = parameters.toString();
  return `#${place}${text ? `?${text}` : ""}`;
}

function readAddress() {
  const [place, text] = location.hash.slice(1).split("?");
  const parameters = new URLSearchParams(text || "");
  const { settings } = browser;
  for (const facet of Object.keys(FACETS)) settings[facet] = new Set(parameters.getAll(facet));
  settings.search = parameters.get("search") || "";
  settings.order = Object.hasOwn(ORDERS, parameters.get("order")) ? parameters.get("order") : "file";
  browser.sample = parameters.has("sample") ? Number(parameters.get("sample")) : null;
  try {
    const [benchmark, id] = place.split("/").map(decodeURIComponent);
    return browser.problems.find((problem) => problem.id === id && EVALUATION.benchmarks[problem.benchmark].name === benchmark) || null;
  } catch {
    return null; // no address of ours
  }
}

function writeAddress() {
  history.replaceState(null, "", address(browser.open));
}

async function followAddress() {
  const problem = readAddress();
  browser.open = problem;
  document.body.toggleAttribute("data-reading", problem !== null);
  showSettings();
  await browse();
}

// The numbers and the protocol that they were made under.

function showNumbers() {
  const { benchmarks } = EVALUATION;
  const missing = sum(benchmarks.map(({ counts }) => counts.pending + counts.unanswered));
  const total = sum(benchmarks.map(({ counts }) => sum(Object.values(counts))));
  byId("model-name").append(visible(EVALUATION.name));
  byId("model-kind").append(visible(EVALUATION.model));
  byId("evaluation-state").textContent = missing
    ? `${count(total - missing)} of ${count(total)} responses graded`
    : `${count(total)} responses`;
  byId("evaluation-state").dataset.state = missing ? "open" : "";
  byId("foot").textContent = `Page written ${EVALUATION.writtenAt}. Keys: ← → or j k for the previous and next problem, / to search.`;
  const nameCell = ({ title, numProblems, numSamples }) => [
    h("b", {}, title),
    h("small", {}, `${plural(numProblems, "problem")}${numSamples > 1 ? ` × ${numSamples}` : ""}`),
  ];
  byId("numbers").append(
    problemPanel(EVALUATION, "Not in this folder: ") || "",
    h("div", { class: "card" }, benchmarkTable(benchmarks, nameCell), protocolPanel(benchmarks)),
  );
}

// Settings by row, benchmarks by column; what all of them share is said once.
function protocolPanel(benchmarks) {
  const rows = (part) => {
    const tables = benchmarks.map((benchmark) => new Map(benchmark[part]));
    return [...new Set(tables.flatMap((table) => [...table.keys()]))].map((key) => {
      const values = tables.map((table) => table.get(key) ?? "–");
      const same = values.every((value) => value === values[0]);
      const cells = same ? [h("td", { colspan: values.length }, values[0])] : values.map((value) => h("td", {}, value));
      return h("tr", {}, h("td", {}, key), cells);
    });
  };
  const heading = (text, cells) => h("tr", {}, h("th", {}, text), cells);
  const summary = rows("summary");
  return h(
    "details",
    { id: "protocol" },
    h(
      "summary",
      {},
      "Protocol ",
      benchmarks.map(({ hash, title }, at) => [
        at ? " " : "",
        h("span", { class: "hash", title: `protocol of ${title}` }, hash || "unknown"),
      ]),
    ),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          heading(
            "",
            benchmarks.map(({ title }) => h("th", {}, title)),
          ),
        ),
        h("tbody", {}, rows("protocol")),
        summary.length > 0 && h("tbody", {}, heading("also in summary.json", [h("th", { colspan: benchmarks.length })]), summary),
      ),
    ),
  );
}

async function start() {
  showNumbers();
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  if (!CAN_UNPACK) {
    byId("foot").before(h("p", { class: "empty" }, "This browser cannot unpack the responses: use one of 2023 or later."));
    return;
  }
  browser.problems = await unpack("problem-index");
  browser.problems.forEach(prepare);
  if (!browser.problems.length) {
    byId("foot").before(h("p", { class: "empty" }, "No problems yet: problems.jsonl and ledger.jsonl are missing or empty."));
    return;
  }
  byId("filters").hidden = document.querySelector(".panes").hidden = false;
  drawFilters();
  startList();
  document.addEventListener("keydown", turnByKey);
  window.addEventListener("hashchange", followAddress);
  await followAddress();
}

document.addEventListener("DOMContentLoaded", start);
