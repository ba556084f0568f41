// The flow: does it tell right from wrong, how much does it weigh, does it follow, and which tokens
// does it reward.

import { byId, glyph, h, parts, visible } from "./dom.js";
import { inUnits, unitOf } from "./flow_tokens.js";
import { count, figure, isNumber, percent, plural } from "./format.js";
import { openRollout } from "./rollouts.js";
import { SECTIONS, chartLines, runCharts } from "./run_charts.js";
import { RUN } from "./run_data.js";
import { readAddress, writeAddress } from "./tabs.js";
import { CAN_UNPACK, unpack } from "./unpack.js";

/** @import { TokenRow, TokenWindow, Remark, YardstickData } from "./data" */
/** @import { Child, Part, Queue, RunChart } from "./types" */

const FLOW_CHARTS = [
  "Wrong strays further",
  "Wrong is charged more",
  "Place of the charge",
  "Charge explained without a field",
  "Flow share of advantage",
  "Groups moved by the flow alone",
  "Flow loss",
  "Drift of the field",
  "Spread of deviations",
  "Responses learned from",
  "Flow gradient norm",
  "Offline fit",
];

const TOKENS_SHOWN = 15; // of a window and sign, without a filter

export async function showFlow() {
  const view = byId("flow");
  const health = RUN.flow;
  if (health.missing && !health.hasTokens && !health.yardstick) {
    view.append(h("p", { class: "empty" }, health.missing));
    view.dataset.drawn = "true";
    return;
  }
  /** @type {Queue<RunChart>} */
  const queue = [];
  const charts = SECTIONS.flatMap((section) => section.charts);
  const drawable = FLOW_CHARTS.flatMap((title) =>
    charts.filter((chart) => chart.title === title),
  ).filter((chart) => chartLines(chart).length);
  view.append(
    verdictPanel(health.verdicts, health.missing),
    drawable.length ? h("h2", { class: "section" }, "Health of the field") : "",
    h(
      "div",
      { class: "grid" },
      drawable.map((chart) => runCharts.card(chart, queue, flowReading(chart))),
    ),
    health.yardstick ? yardstickPanel(health.yardstick) : "",
  );
  runCharts.drawQueue(queue, view);
  await showTokens(view);
}

/** @param {RunChart} chart */
function flowReading(chart) {
  if (chart.source)
    return "Loss of the fit on expert solutions, before training; lower is a closer fit.";
  return chart.lines.map(([key]) => RUN.flow.readings[key]).find(Boolean);
}

/**
 * What the fit measured, on held-out tokens and on responses that it graded.
 * @param {YardstickData} yardstick
 */
function yardstickPanel({ source, rows, names, aucs, num_responses, accuracy }) {
  /** @type {Record<string, string>} */
  const times = { reward: "of the reward", fit: "random, as in the fit" };
  const deviations = plainTable(
    "held-out",
    [
      ["Layer", ""],
      ["Times", ""],
      ...names.map((name) => /** @type {[string, string]} */ ([name, "num"])),
    ],
    rows.map(({ layer, at, values }) => {
      const least = Math.min(...names.map((name) => values[name]).filter(isNumber));
      return [
        layer === -1 ? "all" : String(layer),
        times[at],
        ...names.map((name) => numberCell(values[name], least)),
      ];
    }),
  );
  const probed = plainTable(
    "probed",
    [
      ["Wrong siblings have more", ""],
      ["AUC", "num"],
      ["95 % interval", "num"],
      ["Pairs", "num"],
    ],
    aucs.map(({ name, auc, low, high, pairs }) => [
      name,
      auc.toFixed(2),
      isNumber(low) && isNumber(high) ? `${low.toFixed(2)} – ${high.toFixed(2)}` : "–",
      isNumber(pairs) ? count(pairs) : "–",
    ]),
  );
  const right = isNumber(accuracy) ? `, ${percent(accuracy)} right` : "";
  const graded = isNumber(num_responses) && `${plural(num_responses, "response")}${right}`;
  return h(
    "div",
    { id: "yardstick" },
    h(
      "h2",
      { class: "section" },
      "The fit, before training ",
      h("small", {}, h("code", {}, source)),
    ),
    rows.length > 0 &&
      h(
        "div",
        { class: "card" },
        h(
          "p",
          { class: "reading" },
          "Held-out deviation of the field beside velocities that need none; lower is a closer " +
            "fit, the least is bold.",
        ),
        h("div", { class: "wide-table" }, deviations),
      ),
    aucs.length > 0 &&
      h(
        "div",
        { class: "card" },
        h(
          "p",
          { class: "reading" },
          "Does it tell right from wrong? 0.5: no better than chance.",
          graded && ` ${graded}.`,
        ),
        h("div", { class: "wide-table" }, probed),
      ),
  );
}

/**
 * @param {number | null | undefined} value
 * @param {number} least
 */
function numberCell(value, least) {
  const text = figure(isNumber(value) ? Number(value.toPrecision(3)) : value);
  return value === least ? h("b", {}, text) : text;
}

/**
 * @param {string} name
 * @param {[string, string][]} titles
 * @param {Child[][]} rows
 */
function plainTable(name, titles, rows) {
  const line = (/** @type {string} */ tag, /** @type {Child[]} */ cells) =>
    h(
      "tr",
      {},
      cells.map((cell, at) => h(tag, { class: titles[at][1] }, cell)),
    );
  return h(
    "table",
    { class: name },
    h(
      "thead",
      {},
      line(
        "th",
        titles.map(([title]) => title),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((cells) => line("td", cells)),
    ),
  );
}

/**
 * Lines that follow from the data, the most telling first.
 * @param {Remark[]} verdicts
 * @param {string} [otherwise]
 */
export function verdictPanel(verdicts, otherwise) {
  const signs = { good: "✓", bad: "!", plain: "·", none: "?" };
  return h(
    "div",
    { class: "card verdict-lines" },
    verdicts.length
      ? verdicts.map(({ level, text }) =>
          h(
            "p",
            { class: `said-${level}` },
            h("i", { "aria-hidden": "true" }, signs[level]),
            h("span", {}, text),
          ),
        )
      : h("p", { class: "said-none" }, otherwise),
  );
}

/** @param {Part} view */
async function showTokens(view) {
  view.append(h("h2", { class: "section" }, "Tokens"));
  if (!RUN.flow.hasTokens || !CAN_UNPACK) {
    const why = CAN_UNPACK
      ? "No token has a flow reward in the logged rollouts."
      : "This browser cannot unpack the tokens: use one of 2023 or later.";
    view.append(h("p", { class: "empty", id: "tokens" }, why));
    return;
  }
  /** @type {TokenWindow[]} */
  const windows = await unpack("flow-tokens");
  const tables = h("div", { id: "tokens" });
  const filter = h("input", {
    type: "search",
    id: "token-filter",
    placeholder: "filter tokens …",
    "aria-label": "filter tokens",
    value: readAddress().settings.get("tokens") ?? "",
    oninput: () => {
      writeAddress("flow", { tokens: filter.value });
      drawTokens(tables, windows, filter.value);
    },
  });
  view.append(
    h(
      "div",
      { class: "bar token-bar" },
      filter,
      h(
        "span",
        { class: "hint" },
        RUN.flow.missing ? "Token rewards, which shaping gave (there is no flow)," : "Flow rewards",
        " of all logged responses, summed by token and ranked within each part of the run. n: " +
          "occurrences; mean: reward per occurrence, ",
        `in units of ${figure(unitOf(windows))}; `,
        "right: share of the right responses that contain the token. Click one to see it in a " +
          "response.",
        RUN.flow.approximate && " There are so many different tokens that rare ones were left out.",
      ),
    ),
    tables,
  );
  tables.onpointerover = ({ target }) =>
    sameTokens(tables, /** @type {Part} */ (target).closest("tr[data-token]"));
  tables.onpointerleave = () => sameTokens(tables, null);
  drawTokens(tables, windows, filter.value);
}

/**
 * @param {Part} tables
 * @param {TokenWindow[]} windows
 * @param {string} filter
 */
function drawTokens(tables, windows, filter) {
  const text = filter.trim().toLowerCase();
  const most = Math.max(
    ...windows.flatMap(({ rewarded, penalised }) =>
      [...rewarded, ...penalised].map(({ reward }) => Math.abs(reward)),
    ),
  );
  /** @type {["rewarded" | "penalised", string][]} */
  const titles = [
    ["rewarded", "Most rewarded"],
    ["penalised", "Most penalised"],
  ];
  const signs = titles.filter(([sign]) => windows.some((part) => part[sign].length));
  const unit = unitOf(windows);
  const all = signs.map(([sign, title]) => {
    const parts = windows.map((part) => ({
      ...part,
      rows: part[sign].filter(({ token }) => token.toLowerCase().includes(text)),
    }));
    return [
      h(
        "h3",
        {},
        title,
        h("small", {}, text ? ` with “${filter.trim()}”` : ` ${TOKENS_SHOWN} of each part`),
      ),
      h(
        "div",
        { class: `windows ${sign}` },
        parts.map((part) => tokenTable(part, sign, most, unit, windows[windows.length - 1].last)),
      ),
    ];
  });
  tables.replaceChildren(...all.flat());
}

/**
 * @param {{ first: number, last: number, rows: TokenRow[] }} window
 * @param {string} sign
 * @param {number} most
 * @param {number} unit
 * @param {number} end
 */
function tokenTable({ first, last, rows }, sign, most, unit, end) {
  const shown = rows.slice(0, TOKENS_SHOWN);
  const titles = [
    ["token", ""],
    ["n", "num"],
    ["mean", "num"],
    ["right", "num"],
  ];
  return h(
    "div",
    { class: "card token-table" },
    h(
      "h4",
      {},
      first === last ? `step ${first}` : `steps ${first}–${last}`,
      last === end && h("small", {}, " latest"),
    ),
    shown.length
      ? h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              titles.map(([title, kind]) => h("th", { class: kind }, title)),
            ),
          ),
          h(
            "tbody",
            {},
            shown.map((row) => tokenRow(row, sign, most, unit)),
          ),
        )
      : h("p", { class: "empty" }, "none"),
    rows.length > shown.length &&
      h(
        "p",
        { class: "hint" },
        `and ${count(rows.length - shown.length)} more: filter to find one`,
      ),
  );
}

/**
 * @param {TokenRow} row
 * @param {string} sign
 * @param {number} most
 * @param {number} unit
 */
function tokenRow({ token, reward, count: number, in_right, in_wrong, place }, sign, most, unit) {
  const where = place.on_page
    ? "click: a response with it"
    : `in rollouts/ of step ${place.step}; not on this page`;
  const row = h(
    "tr",
    {
      "data-token": token,
      title:
        `sum ${figure(reward, true)} over ${plural(number, "occurrence")}; in ` +
        `${percent(in_right)} of right and ${percent(in_wrong)} of wrong responses; ` +
        `${where}`,
    },
    h(
      "td",
      {},
      h(
        "button",
        { class: "chip", disabled: !place.on_page, onclick: () => openRollout(place) },
        tokenLabel(token),
      ),
    ),
    h("td", { class: "num" }, count(number)),
    h("td", { class: "num" }, inUnits(reward / number, unit)),
    h("td", { class: "num" }, isNumber(in_right) ? `${Math.round(100 * in_right)} %` : "–"),
  );
  const hue = sign === "rewarded" ? "--bonus" : "--penalty";
  const length = `${(100 * Math.abs(reward)) / (most || 1)}%`;
  row.style.backgroundImage = `linear-gradient(rgb(var(${hue}) / 0.26), rgb(var(${hue}) / 0.26))`;
  row.style.backgroundSize = `${length} 100%`;
  return row;
}

/**
 * On one line, with signs for spaces at its ends, line breaks and tabs.
 * @param {string} token
 * @returns {Child}
 */
function tokenLabel(token) {
  if (token === "") return glyph("∅");
  const [, before, body, after] = token.match(/^( *)(.*?)( *)$/s) ?? ["", "", token, ""];
  const lines = body
    .split("\n")
    .flatMap((line, at) => [at > 0 && glyph("⏎"), line && visible(line, true)]);
  return [
    before && glyph("␣".repeat(before.length)),
    ...lines,
    after && glyph("␣".repeat(after.length)),
  ];
}

/**
 * The token under the pointer, in all parts of the run.
 * @param {Part} tables
 * @param {Part | null} chosen
 */
function sameTokens(tables, chosen) {
  for (const row of parts(tables, "tr[data-token]"))
    row.classList.toggle("same", row.dataset.token === chosen?.dataset.token);
}
