// The table of runs, and what differs between them.

import { drawHeadline, headline } from "./compared_curves.js";
import { DATA, GROUPS, swatch } from "./comparison_data.js";
import { byId, h, parts } from "./dom.js";
import { chooseFlips } from "./flips.js";
import { bounds, count, duration, isNumber, percent, plural, points } from "./format.js";
import { problemPanel } from "./shared.js";

/** @import { ComparedData, PointData, Setting, VersusData } from "./data" */
/** @import { Child, Column, RunRow } from "./types" */

/**
 * @template Row
 * @param {string} name
 * @param {Column<Row>[]} columns
 * @param {Row[]} rows
 * @param {(row: Row) => string | undefined} kindOf
 */
function compareTable(name, columns, rows, kindOf = () => undefined) {
  return h(
    "table",
    { class: name },
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
      rows.map((row) =>
        h(
          "tr",
          { class: kindOf(row) },
          columns.map(([, kind, cell]) => h("td", { class: kind }, cell(row))),
        ),
      ),
    ),
  );
}

export function showRuns() {
  byId("runs").append(
    ...[
      problemPanel(DATA, "Not there: "),
      h(
        "div",
        { class: "card" },
        h("h2", {}, "Runs"),
        h("div", { class: "wide-scroll" }, runsTable()),
        words(),
      ),
      headline(),
      settingsPanel(),
      h("p", { class: "foot" }, `Comparison written ${DATA.writtenAt}.`),
    ].filter((panel) => panel !== null),
  );
  drawHeadline();
}

function runsTable() {
  /** @type {RunRow[]} */
  const rows = GROUPS.flatMap((group) => [
    ...(group.pooled ? [{ kind: "pool", group }] : []),
    ...group.runs.map((number) => ({
      kind: group.pooled ? "member" : "",
      group,
      run: DATA.runs[number],
      number,
    })),
  ]);
  const several = DATA.runs.length > 1;
  const reach = Math.max(
    0.05,
    ...DATA.runs.flatMap(({ versus }) =>
      versus?.difference ? [Math.abs(versus.difference.low), Math.abs(versus.difference.high)] : [],
    ),
  );
  const of =
    (/** @type {(run: ComparedData, number: number) => Child} */ cell) =>
    (/** @type {RunRow} */ row) => (row.run ? cell(row.run, Number(row.number)) : "");
  /** @type {(false | Column<RunRow>)[]} */
  const possible = [
    ["Run", "name", nameCell],
    ["Method", "", of((run) => run.method || "–")],
    ["Seed", "num", of((run) => (run.seed === null ? "–" : String(run.seed)))],
    ["Steps", "num", of(stepsCell)],
    ["Training", "num", of((run) => (isNumber(run.hours) ? duration(3600 * run.hours) : "–"))],
    ["Best held-out", "num", of((run) => pointCell(run.best))],
    ["Last held-out", "num strong", lastCell],
    ["Greedy", "num", of((run) => percent(run.last?.greedy))],
    several && ["Against the first", "num", of(differenceCell)],
    several && [
      `± ${(100 * reach).toFixed(0)} points`,
      "",
      of(({ versus }) => againstBar(versus, reach)),
    ],
    several && ["p", "num", of(({ versus }) => pValue(versus))],
    several && ["Greedy flips", "num", of(flipsCell)],
  ];
  const columns = possible.filter((column) => column !== false);
  return compareTable("compared", columns, rows, ({ kind }) => kind);
}

/** @param {RunRow} row */
function nameCell({ group, run }) {
  if (!run) return [swatch(group), h("b", {}, group.name)];
  return [
    swatch(group),
    group.pooled ? run.name : h("b", {}, run.name),
    run === DATA.runs[0] && h("small", {}, "the first run"),
  ];
}

/** @param {ComparedData} run */
function stepsCell({ numSteps, plannedSteps }) {
  if (numSteps === null) return "none";
  return [
    count(numSteps),
    isNumber(plannedSteps) &&
      plannedSteps !== numSteps &&
      h("small", {}, `of ${count(plannedSteps)}`),
  ];
}

/** @param {PointData | null} point */
function pointCell(point) {
  return point ? [percent(point.accuracy), h("small", {}, `step ${count(point.step)}`)] : "–";
}

/** @param {RunRow} row */
function lastCell({ group, run }) {
  const point = run ? run.last : group.last;
  if (!point) return "–";
  const [value, note] =
    "mean" in point ? [point.mean, `${group.runs.length} seeds, `] : [point.accuracy, ""];
  return [
    percent(value),
    h("small", {}, `${note}step ${count(point.step)}`),
    isNumber(run?.numProblems) && h("small", {}, plural(run.numProblems, "problem")),
    isNumber(point.low) &&
      h(
        "small",
        { title: run ? "95 % interval over problems" : "95 % t-interval over seeds" },
        bounds(point),
      ),
  ];
}

/** @param {ComparedData} run */
function differenceCell({ versus }) {
  if (!versus) return "";
  if (!versus.difference) return h("span", { class: "cut" }, "not compared");
  const { value, low, high } = versus.difference;
  return [
    h("span", { class: `change ${low > 0 ? "up" : high < 0 ? "down" : ""}` }, points(value)),
    h("small", {}, `${points(low)} to ${points(high)}`),
  ];
}

/**
 * The difference with its interval around zero.
 * @param {VersusData | null} versus
 * @param {number} reach
 */
function againstBar(versus, reach) {
  if (!versus?.difference) return "";
  const { value, low, high } = versus.difference;
  /**
   * @param {string} name
   * @param {number} from
   * @param {number} [to]
   */
  const place = (name, from, to) => {
    const mark = h("i", { class: name });
    mark.style.left = `${50 + (50 * from) / reach}%`;
    if (to !== undefined) mark.style.width = `${(50 * (to - from)) / reach}%`;
    return mark;
  };
  const kind = low > 0 ? "up" : high < 0 ? "down" : "";
  return h(
    "div",
    { class: "against" },
    place("zero", 0),
    place(`interval ${kind}`, low, high),
    place("at", value),
  );
}

/** @param {VersusData | null} versus */
function pValue(versus) {
  if (!versus || !isNumber(versus.p)) return "";
  return h("span", { title: versus.test }, versus.p < 0.001 ? "< 0.001" : versus.p.toFixed(3));
}

/**
 * @param {ComparedData} run
 * @param {number} number
 */
function flipsCell({ versus }, number) {
  if (!versus?.difference) return "";
  return h(
    "button",
    {
      class: "link",
      title:
        `${versus.gained} problems that the first run's greedy answer misses are solved ` +
        `here, ${versus.lost} the other way`,
      onclick: () => chooseFlips(number),
    },
    `+${count(versus.gained)} −${count(versus.lost)}`,
  );
}

// What a table cannot say.
function words() {
  /** @type {Child[][]} */
  const lines = DATA.runs.flatMap(({ name, versus }) =>
    (versus?.words || []).map((text) => [h("b", {}, name), `: ${text}.`]),
  );
  const compared = DATA.runs.flatMap(({ versus }) => (versus?.difference ? [versus.test] : []));
  if (compared.length) {
    const tests = [...new Set(compared)].join(" or ");
    lines.push([
      "Against the first: points of held-out accuracy, paired by problem, with 95 % interval; " +
        `p of no difference (${tests}). `,
      "The problems vary, not the training: other seeds could give other differences.",
      compared.length > 1 &&
        ` With ${compared.length} comparisons some p values are small by chance.`,
    ]);
  }
  for (const { pooled, name, runs, last } of GROUPS) {
    if (!pooled || !last) continue;
    if (runs.some((number) => Number(DATA.runs[number].last?.step) > last.step))
      lines.push([
        h("b", {}, name),
        `: pooled accuracy at step ${count(last.step)}, the last that every seed evaluated; ` +
          "some have come further.",
      ]);
  }
  if (GROUPS.some(({ pooled }) => pooled))
    lines.push([
      "Runs that differ in their seed alone are pooled: mean over seeds and 95 % t-interval, " +
        "wide for few seeds.",
    ]);
  return (
    lines.length > 0 &&
    h(
      "ul",
      { class: "words" },
      lines.map((line) => h("li", {}, line)),
    )
  );
}

function settingsPanel() {
  const rows = DATA.settings;
  const card = h("div", { class: "card", id: "settings" }, h("h2", {}, "What differs"));
  if (!rows.length) {
    card.append(
      h(
        "p",
        { class: "empty" },
        DATA.runs.some(({ method }) => method)
          ? "The configs are equal."
          : "No run here has a config.",
      ),
    );
    return card;
  }
  /** @type {Column<Setting>[]} */
  const columns = [
    ["Setting", "", ({ key }) => key],
    ...DATA.runs.map(
      ({ name }, at) => /** @type {Column<Setting>} */ ([name, "", ({ values }) => values[at]]),
    ),
  ];
  const unknown = rows.filter((row) => row.unknown);
  card.append(
    h(
      "p",
      { class: "hint" },
      "Settings and versions that are not the same in all runs; what is not listed is equal. " +
        "Bold: unlike the first run.",
    ),
    settingsTable(
      columns,
      rows.filter((row) => !row.unknown),
    ),
    unknown.length === 0
      ? ""
      : h(
          "details",
          { class: "section" },
          h(
            "summary",
            {},
            `${plural(unknown.length, "setting")} that some configs do not have, written by ` +
              "another version",
          ),
          settingsTable(columns, unknown),
        ),
  );
  return card;
}

/**
 * @param {Column<Setting>[]} columns
 * @param {Setting[]} rows
 */
function settingsTable(columns, rows) {
  const table = compareTable("settings", columns, rows);
  parts(table, "tbody tr").forEach((line, row) =>
    [...line.children]
      .slice(1)
      .forEach((cell, at) =>
        cell.classList.add(rows[row].values[at] === rows[row].values[0] ? "same" : "other"),
      ),
  );
  return h("div", { class: "wide-scroll" }, table);
}
