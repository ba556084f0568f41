// The filters and the list of problems. Only the rows in sight are in the document.

const ROW = 78; // pixels, as in evaluation.css
const MOST_CHIPS = 8; // of a facet; more values become a menu
const MOST_MARKS = 10; // samples shown one by one in a row

function drawFilters() {
  const chips = (facet, values) =>
    h(
      "div",
      { class: "chips", "data-facet": facet },
      values.map(([value, label, title]) => chip(facet, value, label, title)),
    );
  const present = (facet) =>
    new Set(browser.problems.flatMap((problem) => problem.samples.flatMap((sample) => FACETS[facet].of(sample, problem))));
  const [verdicts, traits] = [present("verdict"), present("only")];
  const order = (event) => {
    browser.settings.order = event.target.value;
    browser.open = null; // begin with the first
    changed();
  };
  byId("filters").replaceChildren(
    h(
      "div",
      { class: "bar" },
      EVALUATION.benchmarks.length > 1 &&
        facet(
          "benchmark",
          EVALUATION.benchmarks.map(({ name, title }) => [name, title]),
          chips,
        ),
      chips(
        "verdict",
        Object.entries(OUTCOMES)
          .filter(([verdict]) => verdicts.has(verdict))
          .map(([verdict, [, label, title]]) => [verdict, label, title]),
      ),
      traits.size > 0 &&
        chips(
          "only",
          Object.entries(TRAITS)
            .filter(([trait]) => traits.has(trait))
            .map(([trait, [label, title]]) => [trait, label, title]),
        ),
      sourceValues().length > 1 && facet("source", sourceValues(), chips),
      h("input", {
        type: "search",
        id: "search",
        placeholder: "search …",
        title: "in questions, answers, responses and the judge's words; press /",
        "aria-label": "search",
        oninput: later(typed, 120),
      }),
      h("button", { class: "link", id: "clear", onclick: clearFilters }, "clear filters"),
    ),
  );
  byId("list-head").replaceChildren(
    h("span", { id: "tally", role: "status" }),
    h(
      "select",
      { id: "order", "aria-label": "order", onchange: order },
      Object.entries(ORDERS).map(([value, [text]]) => h("option", { value }, text)),
    ),
  );
}

// The data sources, unless they say no more than the benchmarks do.
function sourceValues() {
  const sources = EVALUATION.benchmarks.map(
    (_, at) => new Set(browser.problems.filter(({ benchmark }) => benchmark === at).map(({ source }) => source ?? "")),
  );
  if (sources.every((values) => values.size < 2)) return [];
  return [...new Set(sources.flatMap((values) => [...values]))].sort().map((source) => [source, source || "no source"]);
}

function facet(name, values, chips) {
  if (values.length <= MOST_CHIPS) return chips(name, values);
  const choose = (event) => {
    browser.settings[name] = new Set(event.target.value ? [event.target.value] : []);
    changed();
  };
  const all = h("option", { value: "" }, `all ${count(values.length)} ${name}s`);
  return h(
    "select",
    { id: `choose-${name}`, "aria-label": name, onchange: choose },
    all,
    values.map(([value, label]) => h("option", { value }, label)),
  );
}

function chip(facet, value, label, title) {
  const choose = () => {
    const chosen = browser.settings[facet];
    if (!chosen.delete(value)) chosen.add(value);
    changed();
  };
  const mark = facet === "verdict" && h("i", { class: `mark ${value}` });
  const node = h("button", { class: "chip", "aria-pressed": "false", title: title || null, onclick: choose }, mark, label, h("small", {}));
  node.dataset.value = value;
  return node;
}

function later(action, wait) {
  let timer;
  return (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(event), wait);
  };
}

function typed(event) {
  browser.settings.search = event.target.value;
  changed();
}

function clearFilters() {
  Object.assign(browser.settings, { benchmark: new Set(), verdict: new Set(), only: new Set(), source: new Set(), search: "" });
  showSettings();
  changed();
}

// The controls as the settings say.
function showSettings() {
  byId("search").value = browser.settings.search;
  byId("order").value = browser.settings.order;
  for (const name of ["benchmark", "source"])
    if (byId(`choose-${name}`)) byId(`choose-${name}`).value = [...browser.settings[name]][0] ?? "";
}

// The reader chose something else: the problem shown must be one of those listed.
async function changed() {
  browser.sample = null;
  await browse(true);
}

// Which problems, and which of their samples, pass the filters; the counts beside them say what one more choice would leave.
async function browse(mustList = false) {
  const drawing = ++browser.drawing;
  const { settings } = browser;
  const text = settings.search.trim().toLowerCase();
  if (text) await Promise.all(browser.problems.map(makeSearchable));
  if (drawing !== browser.drawing) return; // overtaken by a newer choice
  const tallies = Object.fromEntries(Object.keys(FACETS).map((facet) => [facet, new Map()]));
  browser.matches = [];
  for (const problem of browser.problems) {
    const found = !text || problem.searchable.includes(text);
    const shown = [];
    problem.samples.forEach((sample, at) => {
      if ((found || sample.searchable.includes(text)) && passes(sample, problem, tallies)) shown.push(at);
    });
    if (shown.length) browser.matches.push({ problem, shown });
  }
  const compare = ORDERS[settings.order][1];
  if (compare) browser.matches.sort((a, b) => compare(a.problem, b.problem));
  const listed = browser.matches.some(({ problem }) => problem === browser.open);
  if (!browser.open || (mustList && !listed)) browser.open = browser.matches[0]?.problem ?? null;
  drawTallies(tallies);
  drawRows();
  scrollToRow();
  if (mustList) writeAddress();
  await drawProblem();
}

// Whether a sample passes all filters; counts it for every choice that it would pass.
function passes(sample, problem, tallies) {
  const failing = [];
  for (const [name, { of, every }] of Object.entries(FACETS)) {
    const chosen = browser.settings[name];
    const values = of(sample, problem);
    const fits = !chosen.size || (every ? [...chosen].every((value) => values.includes(value)) : values.some((value) => chosen.has(value)));
    if (!fits) failing.push(name);
  }
  const counted = failing.length === 0 ? Object.keys(FACETS) : failing.length === 1 ? failing : [];
  for (const name of counted) {
    if (failing.length && FACETS[name].every) continue;
    for (const value of FACETS[name].of(sample, problem)) tallies[name].set(value, (tallies[name].get(value) || 0) + 1);
  }
  return failing.length === 0;
}

async function makeSearchable(problem) {
  if (problem.searchable !== undefined) return;
  const texts = await textsOf(problem);
  problem.samples.forEach((sample, at) => {
    const { response = [], reply = "" } = texts[at];
    sample.searchable = [...response, sample.prediction, sample.reason, reply].join("\n").toLowerCase();
  });
  problem.searchable = [problem.id, problem.source, problem.question, ...problem.golds].join("\n").toLowerCase();
}

function drawTallies(tallies) {
  const { settings } = browser;
  for (const node of document.querySelectorAll(".chip")) {
    const { facet } = node.parentNode.dataset;
    node.setAttribute("aria-pressed", String(settings[facet].has(node.dataset.value)));
    const left = tallies[facet].get(node.dataset.value) || 0;
    node.querySelector("small").textContent = count(left);
    node.classList.toggle("none", !left);
  }
  const numSamples = sum(browser.matches.map(({ shown }) => shown.length));
  byId("tally").textContent = `${plural(browser.matches.length, "problem")}, ${plural(numSamples, "response")}`;
  byId("clear").hidden = !settings.search && Object.keys(FACETS).every((facet) => !settings[facet].size);
}

// The list.

function startList() {
  const redraw = () => requestAnimationFrame(() => drawRows(true));
  byId("list-body").addEventListener("scroll", redraw, { passive: true });
  window.addEventListener("scroll", redraw, { passive: true });
  window.addEventListener("resize", redraw);
  const measure = () => document.documentElement.style.setProperty("--toolbar", `${byId("filters").offsetHeight}px`);
  measure();
  new ResizeObserver(measure).observe(byId("filters"));
}

// Rows from the first to the last in sight, and a few around them. `same`: only the scroll position has changed.
function drawRows(same = false) {
  const rows = byId("rows");
  rows.style.height = `${Math.max(1, browser.matches.length) * ROW}px`;
  if (!browser.matches.length) {
    rows.replaceChildren(h("p", { class: "empty" }, "No response fits these filters."));
    return;
  }
  const [box, frame] = [rows.getBoundingClientRect(), byId("list-body").getBoundingClientRect()];
  const first = Math.max(0, Math.floor((Math.max(0, frame.top) - box.top) / ROW) - 4);
  const last = Math.min(browser.matches.length, Math.ceil((Math.min(innerHeight, frame.bottom) - box.top) / ROW) + 4);
  const focused = document.activeElement?.closest("#rows a")?.dataset.at;
  const kept = new Map(same ? [...rows.children].map((node) => [Number(node.dataset.at), node]) : []);
  rows.replaceChildren(...browser.matches.slice(first, last).map(({ problem }, at) => kept.get(first + at) ?? row(problem, first + at)));
  if (focused) rows.querySelector(`[data-at="${focused}"]`)?.focus({ preventScroll: true });
}

function row(problem, at) {
  const picture = problem.images.find(({ key }) => key);
  const node = h(
    "a",
    { class: "row", href: address(problem), "data-at": at, "aria-current": problem === browser.open ? "true" : null },
    picture && h("img", { src: byId(`picture-${picture.key}`).textContent, alt: "" }),
    h(
      "span",
      { class: "what" },
      h("span", { class: "name" }, problem.id, EVALUATION.benchmarks.length > 1 && ` · ${EVALUATION.benchmarks[problem.benchmark].title}`),
      h(
        "span",
        { class: "snippet" },
        problem.question.replaceAll("<image>", " ").replace(/\s+/g, " ").trim().slice(0, 140) || "(no question)",
      ),
    ),
    h("span", { class: "score" }, shareText(problem), marks(problem)),
  );
  node.style.top = `${at * ROW}px`;
  return node;
}

// Right of counted, and how many are not counted.
function shareText({ right, counted, samples }) {
  const left = samples.length - counted;
  return h(
    "b",
    { title: `${right} of ${counted} right${left ? `, ${left} not counted` : ""}` },
    counted ? `${right}/${counted}` : "–",
    left > 0 && h("small", {}, ` +${left}?`),
  );
}

function marks(problem) {
  if (problem.samples.length <= MOST_MARKS) {
    return h(
      "span",
      { class: "marks", "aria-hidden": "true" },
      problem.samples.map(({ verdict }) => h("i", { class: verdict })),
    );
  }
  const counts = {};
  for (const { verdict } of problem.samples) counts[verdict] = (counts[verdict] || 0) + 1;
  return verdictBar({ counts });
}

const openAt = () => browser.matches.findIndex(({ problem }) => problem === browser.open);

function scrollToRow() {
  const at = openAt();
  const list = byId("list-body");
  if (at < 0 || list.scrollHeight <= list.clientHeight) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
}

function turn(by) {
  const match = browser.matches[Math.max(0, openAt() + by)];
  if (!match || match.problem === browser.open) return;
  browser.open = match.problem;
  browser.sample = null;
  writeAddress();
  scrollToRow();
  drawRows();
  drawProblem();
}

function turnByKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || byId("lightbox").open) return;
  if (event.key === "Escape" && event.target === byId("search")) event.target.blur();
  if (event.target.closest?.("input, select, textarea")) return;
  if (event.key === "/") {
    byId("search").focus();
    event.preventDefault();
  }
  if (["ArrowRight", "j"].includes(event.key)) turn(1);
  if (["ArrowLeft", "k"].includes(event.key)) turn(-1);
}
