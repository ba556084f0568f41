// The rollout browser. The index (everything but the tokens) is unpacked once, a step's tokens when one of its groups is shown.

const GROUPS_PER_PAGE = 4;
const RESPONSE_FILTERS = {
  all: ["all responses", () => true],
  correct: ["correct", (response) => response.verdict === "correct"],
  wrong: ["wrong", (response) => response.verdict === "wrong"],
  error: ["not graded", (response) => response.verdict !== "correct" && response.verdict !== "wrong"],
  truncated: ["truncated", (response) => response.finish === "length"],
  flow: ["with a flow reward", (response) => response.numFlowTokens > 0],
};
const GROUP_FILTERS = {
  all: ["all groups", () => true],
  mixed: ["right and wrong", (right, total) => right > 0 && right < total],
  right: ["all right", (right, total) => right === total],
  wrong: ["none right", (right) => right === 0],
};

const browser = {
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

function stepTokens(step) {
  if (!browser.steps.has(step)) browser.steps.set(step, unpack(`rollout-step-${step}`));
  return browser.steps.get(step);
}

// All groups, with the number of right responses and the group's place among its step's tokens.
async function rolloutGroups() {
  browser.groups ??= unpack("rollout-index").then((groups) => {
    let previous = null;
    for (const group of groups) {
      group.at = previous?.step === group.step ? previous.at + 1 : 0;
      group.right = group.responses.filter((response) => response.verdict === "correct").length;
      previous = group;
    }
    return groups;
  });
  return browser.groups;
}

async function showRollouts() {
  const view = byId("rollouts");
  const first = !browser.shown;
  browser.shown = true;
  if (!CAN_UNPACK) {
    if (first) view.append(h("p", { class: "empty" }, "This browser cannot unpack the rollouts: use one of 2023 or later."));
    return;
  }
  if (!RUN.rollouts.steps.length) {
    if (first)
      view.append(h("p", { class: "empty" }, "No rollouts yet: the folder rollouts/ is missing or empty, or train.log_rollouts is 0."));
    return;
  }
  if (first) {
    view.append(toolbar(), h("div", { id: "groups" }), pager("bottom"));
    document.addEventListener("keydown", turnByKey);
  }
  if (first || readAddress().settings.size) applyAddress();
  else rememberSettings();
}

function applyAddress() {
  for (const [name, value] of readAddress().settings) if (name in browser.settings) browser.settings[name] = value;
  const { settings } = browser;
  if (settings.step !== "all" && !RUN.rollouts.steps.includes(Number(settings.step))) settings.step = String(RUN.rollouts.steps.at(-1));
  if (!Object.hasOwn(RESPONSE_FILTERS, settings.responses)) settings.responses = "all";
  if (!Object.hasOwn(GROUP_FILTERS, settings.groups)) settings.groups = "all";
  if (!Object.hasOwn(RUN.rollouts.scales, settings.shade)) settings.shade = DEFAULT_SHADE;
  for (const name of ["step", "responses", "groups", "shade", "search"])
    if (byId(`choose-${name}`)) byId(`choose-${name}`).value = settings[name];
  if (byId("choose-attention")) byId("choose-attention").checked = settings.attention === "mean";
  browse(Number(readAddress().settings.get("page") || 1) - 1);
}

function rememberSettings() {
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

function toolbar() {
  const steps = RUN.rollouts.steps;
  const choose = (name) => (event) => {
    browser.settings[name] = event.target.value;
    if (name === "shade") reshade();
    else browse(0);
  };
  const select = (name, label, options) =>
    h(
      "label",
      {},
      label,
      h(
        "select",
        { id: `choose-${name}`, onchange: choose(name) },
        options.map(([value, text]) => h("option", { value }, text)),
      ),
    );
  const goTo = (at) => {
    browser.settings.step = byId("choose-step").value = String(steps[Math.min(steps.length - 1, Math.max(0, at))]);
    browse(0);
  };
  return h(
    "div",
    { class: "toolbar" },
    h(
      "div",
      { class: "bar" },
      h(
        "div",
        { class: "stepper" },
        select("step", "Step ", [["all", `all ${count(steps.length)} steps`], ...steps.map((step) => [step, step])]),
        h(
          "button",
          {
            id: "step-back",
            title: "previous step",
            "aria-label": "previous step",
            onclick: () => goTo(Number(byId("slide-step").value) - 1),
          },
          "‹",
        ),
        h("input", {
          type: "range",
          id: "slide-step",
          min: 0,
          max: steps.length - 1,
          "aria-label": "step",
          oninput: (event) => goTo(Number(event.target.value)),
        }),
        h(
          "button",
          { id: "step-on", title: "next step", "aria-label": "next step", onclick: () => goTo(Number(byId("slide-step").value) + 1) },
          "›",
        ),
      ),
      select(
        "responses",
        "Show ",
        Object.entries(RESPONSE_FILTERS).map(([value, [text]]) => [value, text]),
      ),
      select(
        "groups",
        "in ",
        Object.entries(GROUP_FILTERS).map(([value, [text]]) => [value, text]),
      ),
      h("input", {
        type: "search",
        id: "choose-search",
        placeholder: "search question, answer, response …",
        "aria-label": "search",
        oninput: choose("search"),
      }),
    ),
    h(
      "div",
      { class: "bar" },
      Object.keys(RUN.rollouts.scales).length
        ? select(
            "shade",
            "Shade tokens by ",
            Object.entries(QUANTITIES)
              .filter(([name]) => name in RUN.rollouts.scales)
              .map(([name, { label }]) => [name, label]),
          )
        : h("span", { class: "hint" }, "No per-token values were recorded."),
      h("div", { id: "legend" }),
      attentionSwitch(),
      h("span", { class: "gap" }),
      h("span", { id: "tally", role: "status" }),
      pager("top"),
    ),
    leftOut(),
  );
}

function leftOut() {
  const { numStepsLeftOut, numGroupsLeftOut, numResponses, steps } = RUN.rollouts;
  if (!numStepsLeftOut && !numGroupsLeftOut) return null;
  const parts = [
    numStepsLeftOut && `${plural(numStepsLeftOut, "step")} of ${count(numStepsLeftOut + steps.length)}`,
    numGroupsLeftOut && `${plural(numGroupsLeftOut, "group")} of the steps shown`,
  ].filter(Boolean);
  return h(
    "p",
    { class: "hint", id: "left-out" },
    `A sample, to keep this file small: ${count(numResponses)} responses are here; ${parts.join(" and ")} stayed in the folder rollouts/.`,
  );
}

function pager(place) {
  const turn = (by) => () => turnPage(by, place === "bottom");
  return h(
    "div",
    { class: "pager", "data-place": place },
    h("button", { class: "back", "aria-label": "previous page", onclick: turn(-1) }, "‹ Previous"),
    h("span", { class: "where" }),
    h("button", { class: "on", "aria-label": "next page", onclick: turn(1) }, "Next ›"),
  );
}

function turnPage(by, fromBelow = false) {
  const page = browser.page + by;
  if (page < 0 || page >= numPages()) return;
  drawPage(page);
  if (fromBelow) byId("rollouts").scrollIntoView();
}

function turnByKey(event) {
  if (byId("rollouts").hidden || event.target.closest("input, select, [role=tab]") || event.altKey || event.ctrlKey || event.metaKey)
    return;
  if (event.key === "ArrowRight") turnPage(1);
  if (event.key === "ArrowLeft") turnPage(-1);
}

const numPages = () => Math.max(1, Math.ceil(browser.matches.length / GROUPS_PER_PAGE));

// Which groups, and which of their responses, pass the filters.
async function browse(page) {
  const all = await rolloutGroups();
  const { step, responses, groups, search } = browser.settings;
  const [, wantsResponse] = RESPONSE_FILTERS[responses];
  const [, wantsGroup] = GROUP_FILTERS[groups];
  const text = search.trim().toLowerCase();
  browser.matches = [];
  for (const group of all) {
    if (step !== "all" && group.step !== Number(step)) continue;
    if (!wantsGroup(group.right, group.responses.length)) continue;
    const found =
      !text || (group.searchable ??= `${group.question}\n${group.answer}\n${group.id}\n${group.source}`.toLowerCase()).includes(text);
    const shown = [];
    group.responses.forEach((response, at) => {
      if (
        wantsResponse(response) &&
        (found || (response.searchable ??= `${response.text}\n${response.prediction}`.toLowerCase()).includes(text))
      )
        shown.push(at);
    });
    if (shown.length) browser.matches.push({ group, shown });
  }
  if (step !== "all") byId("slide-step").value = RUN.rollouts.steps.indexOf(Number(step));
  byId("slide-step").classList.toggle("idle", step === "all");
  return drawPage(Math.min(Math.max(0, page || 0), numPages() - 1));
}

// One response of the page, from another view: {step, group, response, token}, group and response by their places, token where one is meant.
// The browser's way back leads to where it was opened from.
async function openRollout({ step, group, response, token }) {
  if (!CAN_UNPACK) return;
  Object.assign(browser.settings, { step: String(step), responses: "all", groups: "all", search: "" });
  const page = Math.floor(group / GROUPS_PER_PAGE);
  history.pushState(null, "", location.hash);
  writeAddress("rollouts", { step, shade: browser.settings.shade, page: page ? page + 1 : "" });
  openView("rollouts");
  for (const name of ["step", "responses", "groups", "search"]) byId(`choose-${name}`).value = browser.settings[name];
  await browse(page);
  const card = byId("groups").children[group % GROUPS_PER_PAGE];
  const found = response === undefined ? card : card.querySelectorAll(".response")[response];
  if (response !== undefined) found.classList.add("found");
  if (token !== undefined) showToken(found, token);
  found.scrollIntoView({ block: "center" });
}

function showToken(card, at) {
  if (!card.querySelector(`.token[data-at="${at}"]`)) card.querySelector(".text button.more")?.click();
  const node = card.querySelector(`.token[data-at="${at}"]`);
  node?.classList.add("found");
  const text = card.querySelector(".text");
  if (node) text.scrollTop = node.offsetTop - text.offsetTop - text.clientHeight / 2;
}

async function drawPage(page) {
  browser.page = page;
  const drawing = ++browser.drawing;
  const matches = browser.matches.slice(page * GROUPS_PER_PAGE, (page + 1) * GROUPS_PER_PAGE);
  const tokens = await Promise.all(matches.map(({ group }) => stepTokens(group.step)));
  if (drawing !== browser.drawing) return; // overtaken by a newer choice
  const cards = matches.map(({ group, shown }, at) => groupCard(group, shown, tokens[at][group.at]));
  byId("groups").replaceChildren(...(cards.length ? cards : [h("p", { class: "empty" }, "No rollout fits these filters.")]));
  const numShown = browser.matches.reduce((sum, match) => sum + match.shown.length, 0);
  byId("tally").textContent = `${plural(numShown, "response")} in ${plural(browser.matches.length, "group")}`;
  for (const pages of document.querySelectorAll(".pager")) {
    pages.querySelector(".where").textContent = `${count(page + 1)} / ${count(numPages())}`;
    pages.querySelector(".back").disabled = page === 0;
    pages.querySelector(".on").disabled = page >= numPages() - 1;
  }
  byId("tooltip").hidden = true;
  if (!byId("rollouts").hidden) rememberSettings();
  drawLegend();
  byId("groups").dataset.drawing = String(drawing);
  setTimeout(unpackNeighbours, 50);
}

// The steps before and after the one shown, so that moving on is quick.
function unpackNeighbours() {
  const steps = RUN.rollouts.steps;
  const at = steps.indexOf(Number(browser.settings.step));
  if (at >= 0) for (const step of [steps[at - 1], steps[at + 1]]) if (step !== undefined) stepTokens(step);
}
