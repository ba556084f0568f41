// Problems whose greedy answer is right in one run and wrong in the other, with both responses.

import { OUTCOMES } from "./benchmarks.js";
import { DATA } from "./comparison_data.js";
import { byId, h } from "./dom.js";
import { count, plural } from "./format.js";
import { questionText } from "./shared.js";
import { openView, readAddress, writeAddress } from "./tabs.js";
import { CAN_UNPACK, unpack } from "./unpack.js";

/** @import { Flip, FlipSide } from "./data" */

const FLIPS_AT_ONCE = 20;

/** @type {Record<string, string>} */
const KINDS = { "": "all flips", gained: "newly solved", lost: "lost" };

const chosen = { run: 0, kind: "", search: "", shown: FLIPS_AT_ONCE }; // run 0: none yet

/** @type {Flip[]} */
let flipRows = [];

export function showFlips() {
  const compared = DATA.runs
    .map((run, number) => ({ ...run, number }))
    .filter(({ versus }) => versus?.difference);
  const view = byId("flips");
  if (!compared.length) {
    const why = DATA.runs.flatMap(({ name, versus }) =>
      (versus?.words || []).map((text) => h("p", {}, h("b", {}, name), `: ${text}.`)),
    );
    view.append(
      h(
        "div",
        { class: "empty" },
        h("p", {}, "No run could be compared with the first one, answer by answer."),
        why,
      ),
    );
    return;
  }
  const settings = readAddress().settings;
  const asked = Number(settings.get("run") ?? NaN);
  chosen.run = compared.some(({ number }) => number === asked)
    ? asked
    : chosen.run || compared[0].number;
  const kind = settings.get("kind");
  if (kind !== null && kind in KINDS) chosen.kind = kind;
  chosen.search = settings.get("q") || "";
  view.append(
    h(
      "div",
      { class: "toolbar" },
      h(
        "div",
        { class: "bar" },
        h(
          "label",
          {},
          `${DATA.runs[0].name} against `,
          h(
            "select",
            {
              id: "choose-run",
              onchange: (event) => changeFlips({ run: Number(event.target.value) }),
            },
            compared.map(({ name, number }) =>
              h("option", { value: number, selected: number === chosen.run }, name),
            ),
          ),
        ),
        h("div", {
          class: "choice",
          role: "group",
          "aria-label": "kind of flip",
          id: "flip-kinds",
        }),
        h("input", {
          type: "search",
          id: "flip-search",
          placeholder: "search in problems and responses",
          value: chosen.search,
          oninput: (event) => changeFlips({ search: event.target.value }),
        }),
        h("span", { id: "flip-tally", class: "hint" }),
      ),
    ),
    h("div", { id: "flip-list" }),
  );
  loadFlips();
}

/**
 * From the table of runs.
 * @param {number} number
 */
export function chooseFlips(number) {
  writeAddress("flips", { run: number });
  if (byId("choose-run")) {
    byId("choose-run").value = String(number);
    changeFlips({ run: number });
  } else chosen.run = number;
  openView("flips");
}

/** @param {Partial<typeof chosen>} change */
function changeFlips(change) {
  const other = "run" in change && change.run !== chosen.run;
  Object.assign(chosen, { shown: FLIPS_AT_ONCE }, change);
  writeAddress("flips", { run: chosen.run, kind: chosen.kind, q: chosen.search });
  if (other) loadFlips();
  else listFlips();
}

async function loadFlips() {
  if (!CAN_UNPACK) {
    byId("flip-list").replaceChildren(
      h("p", { class: "empty" }, "This browser cannot unpack the responses; a newer one can."),
    );
    return;
  }
  const run = chosen.run;
  const rows = await unpack(`flips-${run}`);
  if (run !== chosen.run) return; // another one was chosen meanwhile
  flipRows = rows;
  listFlips();
}

function listFlips() {
  const { versus, name } = DATA.runs[chosen.run];
  if (!versus) return;
  const wanted = chosen.search.toLowerCase();
  const text = (/** @type {Flip} */ { id, question, gold, a, b }) =>
    [id, question, gold, a.text, b.text].join("\n").toLowerCase();
  const found = flipRows.filter(
    (row) => (!chosen.kind || row.kind === chosen.kind) && (!wanted || text(row).includes(wanted)),
  );
  /** @type {Record<string, number>} */
  const numbers = { "": flipRows.length, gained: versus.gained, lost: versus.lost };
  byId("flip-kinds").replaceChildren(
    ...Object.entries(KINDS).map(([kind, label]) =>
      h(
        "button",
        {
          "data-kind": kind || "all",
          "aria-pressed": String(kind === chosen.kind),
          onclick: () => changeFlips({ kind }),
        },
        `${label} ${count(numbers[kind])}`,
      ),
    ),
  );
  const [before, after] = versus.steps ?? [];
  const steps = before === after ? before : `${before} and ${after}`;
  byId("flip-tally").textContent =
    `${plural(found.length, "problem")}; greedy answers at step ${steps}`;
  byId("flip-list").replaceChildren(
    ...found.slice(0, chosen.shown).map((row) => flipCard(row, name)),
    found.length
      ? ""
      : h(
          "p",
          { class: "empty" },
          flipRows.length ? "No flip fits." : "No greedy answer flipped between these two runs.",
        ),
    found.length > chosen.shown
      ? h(
          "button",
          { class: "more", onclick: () => changeFlips({ shown: chosen.shown + FLIPS_AT_ONCE }) },
          `${count(found.length - chosen.shown)} more`,
        )
      : "",
  );
  byId("flips").dataset.listed = `${chosen.run} ${chosen.kind} ${chosen.search} ${chosen.shown}`;
}

/**
 * @param {Flip} row
 * @param {string} name
 */
function flipCard(row, name) {
  return h(
    "article",
    { class: "card flip", "data-id": row.id },
    h(
      "p",
      { class: "meta" },
      h("b", {}, row.id),
      h(
        "span",
        {},
        row.kind === "gained" ? "solved by this run alone" : "solved by the first run alone",
      ),
      h("span", { class: "gold" }, h("span", {}, "gold"), h("code", {}, row.gold)),
    ),
    row.question &&
      h("div", { class: "question" }, questionText({ question: row.question, images: [] })),
    h("div", { class: "siblings" }, flipSide(DATA.runs[0].name, row.a), flipSide(name, row.b)),
  );
}

/**
 * @param {string} name
 * @param {FlipSide} side
 */
function flipSide(name, side) {
  const right = side.samples.filter(Boolean).length;
  const [sign, label] = OUTCOMES[side.verdict] || ["", side.verdict];
  return h(
    "div",
    { class: `response ${side.verdict}` },
    h(
      "header",
      {},
      h("b", {}, name),
      h("span", { class: "badge" }, `${sign} ${label}`),
      h("span", {}, "answer ", h("b", {}, side.prediction || "none")),
      side.finish_reason === "length" && h("span", { class: "cut" }, "truncated"),
    ),
    h("div", { class: "text" }, side.text),
    h(
      "footer",
      {},
      h(
        "span",
        { class: "marks" },
        side.samples.map((correct) => h("i", { class: correct ? "correct" : "wrong" })),
      ),
      h("span", {}, `${right} of ${plural(side.samples.length, "sample")} right`),
    ),
  );
}
