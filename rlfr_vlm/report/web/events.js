// What the monitors said: a log.

import { h } from "./dom.js";
import { ACTIONS, around, isMarked, loggedStep } from "./event_marks.js";
import { count, figure, isNumber, plural } from "./format.js";
import { openRollout } from "./rollouts.js";
import { runCharts } from "./run_charts.js";
import { RUN } from "./run_data.js";
import { openView, writeAddress } from "./tabs.js";

/** @import { LoggedEvent, EventData } from "./data" */

/**
 * The log in the order of the file. Small above the curves; on the overview, a run without events
 * says so.
 * @param {boolean} small
 */
export function eventPanel(small) {
  const log = RUN.events;
  if (!log.events.length && small) return null;
  const nothing = log.watched
    ? "No events: the monitors had nothing to say."
    : "No events.jsonl: this run was not watched by monitors.";
  if (!log.events.length) return h("p", { class: "quiet", id: "no-events" }, nothing);
  const tally = Object.keys(ACTIONS)
    .map((action) => ({
      number: log.events.filter((event) => event.action === action).length,
      said: ACTIONS[action],
    }))
    .filter(({ number }) => number)
    .map(({ number, said: [label, kind] }) => [
      " ",
      h("span", { class: `action ${kind}` }, `${count(number)} ${label}`),
    ]);
  return h(
    "div",
    { class: small ? "card events small" : "card events", id: small ? "curve-events" : "events" },
    h(
      "div",
      { class: "bar" },
      h("h2", {}, "Events"),
      h("span", {}, tally),
      h("span", { class: "hint" }, eventNote(log)),
    ),
    h("ol", { class: "scroll" }, log.events.map(eventRow)),
  );
}

/** @param {EventData} log */
function eventNote({ numLeftOut, numRollBacks, numStepsTakenBack }) {
  return [
    "in the order in which they were said",
    numRollBacks > 0 &&
      `; ${plural(numRollBacks, "roll-back")} took ${plural(numStepsTakenBack, "step")} back, ` +
        "which stand in rolled_back.jsonl",
    numLeftOut > 0 && `; ${plural(numLeftOut, "earlier event")} left out`,
    ".",
  ];
}

/** @param {LoggedEvent} event */
function eventRow(event) {
  const since = isNumber(event.since) && event.since < event.step;
  const limit = isNumber(event.limit) ? `, limit ${figure(event.limit)}` : "";
  const measured = isNumber(event.value) && `${event.monitor}: ${figure(event.value)}${limit}`;
  const step = loggedStep(RUN.rollouts.steps, event);
  return h(
    "li",
    { class: "event" },
    actionBadge(event),
    h("span", { class: "at" }, since ? `steps ${event.since}–${event.step}` : `step ${event.step}`),
    h("span", { class: "monitor", title: measured || null }, event.monitor || "–"),
    h(
      "span",
      { class: "said" },
      h("b", {}, event.what || "no text"),
      event.cause && h("span", {}, " · cause: ", event.cause),
      event.do && h("span", { class: "do" }, " → ", event.do),
      isNumber(event.to) && h("span", {}, ` · went back to step ${event.to}`),
    ),
    h(
      "span",
      { class: "go" },
      isMarked(RUN.curves.metrics.steps, event) &&
        h(
          "button",
          { class: "link", title: "show these steps in all curves", onclick: () => zoomTo(event) },
          "curves",
        ),
      step !== null &&
        h(
          "button",
          {
            class: "link",
            title: `what was sampled at step ${step}`,
            onclick: () => openRollout({ step, group: 0 }),
          },
          "rollouts",
        ),
    ),
  );
}

/** @param {LoggedEvent} event */
function actionBadge({ action }) {
  const [label, kind] = Object.hasOwn(ACTIONS, action)
    ? ACTIONS[action]
    : [action || "note", "note"];
  return h("span", { class: `action ${kind}` }, label);
}

/** @param {LoggedEvent} event */
function zoomTo(event) {
  const [first, last] = around(RUN.curves.metrics.steps, event);
  writeAddress("curves");
  openView("curves");
  runCharts.zoom({ "xaxis.range[0]": first, "xaxis.range[1]": last });
}
