// The rollout browser. The index (everything but the tokens) is unpacked once, a step's tokens when
// one of its groups is shown.

import { attentionSwitch } from "./attribution.js";
import { byId, h, part, parts } from "./dom.js";
import { count, plural, sum } from "./format.js";
import { groupCard } from "./group.js";
import { GROUP_FILTERS, RESPONSE_FILTERS, matching } from "./rollout_filters.js";
import {
  DEFAULT_SHADE,
  QUANTITIES,
  browser,
  quantities,
  rememberSettings,
  rolloutGroups,
  stepTokens,
} from "./rollout_store.js";
import { RUN } from "./run_data.js";
import { drawLegend, shadeText } from "./shading.js";
import { openView, readAddress, writeAddress } from "./tabs.js";
import { CAN_UNPACK } from "./unpack.js";

/** @import { PageEvent, Part } from "./types" */

const GROUPS_PER_PAGE = 4;

export async function showRollouts() {
  const view = byId("rollouts");
  const first = !browser.shown;
  browser.shown = true;
  if (!CAN_UNPACK) {
    if (first)
      view.append(
        h(
          "p",
          { class: "empty" },
          "This browser cannot unpack the rollouts: use one of 2023 or later.",
        ),
      );
    return;
  }
  if (!RUN.rollouts.steps.length) {
    if (first)
      view.append(
        h(
          "p",
          { class: "empty" },
          "No rollouts yet: the folder rollouts/ is missing or empty, or train.log_rollouts is 0.",
        ),
      );
    return;
  }
  if (first) {
    view.append(toolbar(), h("div", { id: "groups" }), pager("bottom"));
    document.addEventListener("keydown", (event) => turnByKey(/** @type {PageEvent} */ (event)));
  }
  if (first || readAddress().settings.size) applyAddress();
  else rememberSettings();
}

function applyAddress() {
  const { settings } = browser;
  for (const [name, value] of readAddress().settings)
    if (name in settings) Object.assign(settings, { [name]: value });
  if (settings.step !== "all" && !RUN.rollouts.steps.includes(Number(settings.step)))
    settings.step = String(RUN.rollouts.steps.at(-1));
  if (!Object.hasOwn(RESPONSE_FILTERS, settings.responses)) settings.responses = "all";
  if (!Object.hasOwn(GROUP_FILTERS, settings.groups)) settings.groups = "all";
  if (!Object.hasOwn(RUN.rollouts.scales, settings.shade)) settings.shade = DEFAULT_SHADE;
  showChoices();
  if (byId("choose-attention")) byId("choose-attention").checked = settings.attention === "mean";
  browse(Number(readAddress().settings.get("page") || 1) - 1);
}

function reshade() {
  for (const element of parts(document, "#groups .text")) shadeText(element);
  drawLegend();
  rememberSettings();
}

function toolbar() {
  const steps = RUN.rollouts.steps;
  const choose =
    (/** @type {"step" | "responses" | "groups" | "shade" | "search"} */ name) =>
    (/** @type {PageEvent} */ event) => {
      Object.assign(browser.settings, { [name]: event.target.value });
      if (name === "shade") reshade();
      else browse(0);
    };
  /**
   * @param {"step" | "responses" | "groups" | "shade"} name
   * @param {string} label
   * @param {[string, string][]} options
   */
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
  const goTo = (/** @type {number} */ at) => {
    browser.settings.step = byId("choose-step").value = String(
      steps[Math.min(steps.length - 1, Math.max(0, at))],
    );
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
        select("step", "Step ", [["all", `all ${count(steps.length)} steps`], ...numbered(steps)]),
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
          {
            id: "step-on",
            title: "next step",
            "aria-label": "next step",
            onclick: () => goTo(Number(byId("slide-step").value) + 1),
          },
          "›",
        ),
      ),
      select("responses", "Show ", named(RESPONSE_FILTERS)),
      select("groups", "in ", named(GROUP_FILTERS)),
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
            quantities()
              .filter((name) => name in RUN.rollouts.scales)
              .map((name) => [name, QUANTITIES[name].label]),
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

/**
 * Filters as options of a menu.
 * @param {Record<string, [string, unknown]>} filters
 */
function named(filters) {
  return Object.entries(filters).map(
    ([value, [text]]) => /** @type {[string, string]} */ ([value, text]),
  );
}

/** @param {number[]} steps */
function numbered(steps) {
  return steps.map((step) => /** @type {[string, string]} */ ([String(step), String(step)]));
}

function leftOut() {
  const { numStepsLeftOut, numGroupsLeftOut, numResponses, steps } = RUN.rollouts;
  if (!numStepsLeftOut && !numGroupsLeftOut) return null;
  const parts = [
    numStepsLeftOut &&
      `${plural(numStepsLeftOut, "step")} of ${count(numStepsLeftOut + steps.length)}`,
    numGroupsLeftOut && `${plural(numGroupsLeftOut, "group")} of the steps shown`,
  ].filter(Boolean);
  return h(
    "p",
    { class: "hint", id: "left-out" },
    `A sample, to keep this file small: ${count(numResponses)} responses are here; ` +
      `${parts.join(" and ")} stayed in the folder rollouts/.`,
  );
}

/** @param {string} place */
function pager(place) {
  const turn = (/** @type {number} */ by) => () => turnPage(by, place === "bottom");
  return h(
    "div",
    { class: "pager", "data-place": place },
    h("button", { class: "back", "aria-label": "previous page", onclick: turn(-1) }, "‹ Previous"),
    h("span", { class: "where" }),
    h("button", { class: "on", "aria-label": "next page", onclick: turn(1) }, "Next ›"),
  );
}

/**
 * @param {number} by
 * @param {boolean} fromBelow
 */
function turnPage(by, fromBelow = false) {
  const page = browser.page + by;
  if (page < 0 || page >= numPages()) return;
  drawPage(page);
  if (fromBelow) byId("rollouts").scrollIntoView();
}

/** @param {PageEvent} event */
function turnByKey(event) {
  if (
    byId("rollouts").hidden ||
    event.target.closest("input, select, [role=tab]") ||
    event.altKey ||
    event.ctrlKey ||
    event.metaKey
  )
    return;
  if (event.key === "ArrowRight") turnPage(1);
  if (event.key === "ArrowLeft") turnPage(-1);
}

const numPages = () => Math.max(1, Math.ceil(browser.matches.length / GROUPS_PER_PAGE));

/** @param {number} page */
async function browse(page) {
  const { step } = browser.settings;
  browser.matches = matching(await rolloutGroups(), browser.settings);
  if (step !== "all") byId("slide-step").value = String(RUN.rollouts.steps.indexOf(Number(step)));
  byId("slide-step").classList.toggle("idle", step === "all");
  return drawPage(Math.min(Math.max(0, page || 0), numPages() - 1));
}

/**
 * One response of the page, from another view; group and response by their places, token where one
 * is meant. The browser's way back leads to where it was opened from.
 * @param {{ step: number, group: number, response?: number, token?: number }} place
 */
export async function openRollout({ step, group, response, token }) {
  if (!CAN_UNPACK) return;
  Object.assign(browser.settings, {
    step: String(step),
    responses: "all",
    groups: "all",
    search: "",
  });
  const page = Math.floor(group / GROUPS_PER_PAGE);
  history.pushState(null, "", location.hash);
  writeAddress("rollouts", { step, shade: browser.settings.shade, page: page ? page + 1 : "" });
  openView("rollouts");
  showChoices();
  await browse(page);
  const card = /** @type {Part} */ (byId("groups").children[group % GROUPS_PER_PAGE]);
  const found = response === undefined ? card : card.querySelectorAll(".response")[response];
  if (response !== undefined) found.classList.add("found");
  if (token !== undefined) showToken(found, token);
  found.scrollIntoView({ block: "center" });
}

/** The controls as the settings say. */
function showChoices() {
  const { step, responses, groups, shade, search } = browser.settings;
  for (const [name, value] of Object.entries({ step, responses, groups, shade, search }))
    if (byId(`choose-${name}`)) byId(`choose-${name}`).value = value;
}

/**
 * @param {Part} card
 * @param {number} at
 */
function showToken(card, at) {
  if (!card.querySelector(`.token[data-at="${at}"]`))
    card.querySelector(".text button.more")?.click();
  const node = card.querySelector(`.token[data-at="${at}"]`);
  node?.classList.add("found");
  const text = part(card, ".text");
  if (node) text.scrollTop = node.offsetTop - text.offsetTop - text.clientHeight / 2;
}

/** @param {number} page */
async function drawPage(page) {
  browser.page = page;
  const drawing = ++browser.drawing;
  const matches = browser.matches.slice(page * GROUPS_PER_PAGE, (page + 1) * GROUPS_PER_PAGE);
  const tokens = await Promise.all(matches.map(({ group }) => stepTokens(group.step)));
  if (drawing !== browser.drawing) return; // overtaken by a newer choice
  const cards = matches.map(({ group, shown }, at) =>
    groupCard(group, shown, tokens[at][group.at]),
  );
  byId("groups").replaceChildren(
    ...(cards.length ? cards : [h("p", { class: "empty" }, "No rollout fits these filters.")]),
  );
  const numShown = sum(browser.matches.map(({ shown }) => shown.length));
  byId("tally").textContent =
    `${plural(numShown, "response")} in ${plural(browser.matches.length, "group")}`;
  for (const pages of parts(document, ".pager")) {
    part(pages, ".where").textContent = `${count(page + 1)} / ${count(numPages())}`;
    part(pages, ".back").disabled = page === 0;
    part(pages, ".on").disabled = page >= numPages() - 1;
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
  if (at >= 0)
    for (const step of [steps[at - 1], steps[at + 1]]) if (step !== undefined) stepTokens(step);
}
