// What the monitors said: a log, and marks at its steps in every curve.

const ACTIONS = { warn: ["warning", "warn"], stop: ["stopped", "stop"], roll_back: ["rolled back", "back"] };
const MAX_SIGNS = 100; // in a curve; more lines go without a sign at their top
const WORDS_PER_LINE = 56; // letters, under the pointer

// The log in the order of the file. Small above the curves; on the overview, a run without events says so.
function eventPanel(small) {
  const log = RUN.events;
  if (!log.events.length && small) return null;
  const nothing = log.watched ? "No events: the monitors had nothing to say." : "No events.jsonl: this run was not watched by monitors.";
  if (!log.events.length) return h("p", { class: "quiet", id: "no-events" }, nothing);
  const tally = Object.keys(ACTIONS)
    .map((action) => [log.events.filter((event) => event.action === action).length, ACTIONS[action]])
    .filter(([number]) => number)
    .map(([number, [label, kind]]) => [" ", h("span", { class: `action ${kind}` }, `${count(number)} ${label}`)]);
  return h(
    "div",
    { class: small ? "card events small" : "card events", id: small ? "curve-events" : "events" },
    h("div", { class: "bar" }, h("h2", {}, "Events"), h("span", {}, tally), h("span", { class: "hint" }, eventNote(log))),
    h("ol", { class: "scroll" }, log.events.map(eventRow)),
  );
}

function eventNote({ numLeftOut, numRollBacks, numStepsTakenBack }) {
  return [
    "in the order in which they were said",
    numRollBacks > 0 && `; ${plural(numRollBacks, "roll-back")} took ${plural(numStepsTakenBack, "step")} back, which stand in rolled_back.jsonl`,
    numLeftOut > 0 && `; ${plural(numLeftOut, "earlier event")} left out`,
    ".",
  ];
}

function eventRow(event) {
  const since = isNumber(event.since) && event.since < event.step;
  const measured = isNumber(event.value) && `${event.monitor}: ${figure(event.value)}${isNumber(event.limit) ? `, limit ${figure(event.limit)}` : ""}`;
  const step = loggedStep(event);
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
      isMarked(event) && h("button", { class: "link", title: "show these steps in all curves", onclick: () => zoomTo(event) }, "curves"),
      step !== null &&
        h("button", { class: "link", title: `what was sampled at step ${step}`, onclick: () => openRollout({ step, group: 0 }) }, "rollouts"),
    ),
  );
}

function actionBadge({ action }) {
  const [label, kind] = Object.hasOwn(ACTIONS, action) ? ACTIONS[action] : [action || "note", "note"];
  return h("span", { class: `action ${kind}` }, label);
}

// The last step of an event whose rollouts are on the page.
function loggedStep({ step, since }) {
  return RUN.rollouts.steps.findLast((logged) => logged <= step && logged >= (since ?? step)) ?? null;
}

// Marks stand at steps that the curves have, so that a damaged number does not stretch them.
function isMarked({ step }) {
  const steps = RUN.curves.metrics.steps;
  return steps.length > 0 && step >= steps[0] && step <= steps.at(-1);
}

function zoomTo({ step, since }) {
  const steps = RUN.curves.metrics.steps;
  const from = Math.max(steps[0], Math.min(since ?? step, step));
  const pad = Math.max(4, step - from);
  writeAddress("curves");
  openView("curves");
  zoomAll({ "xaxis.range[0]": Math.max(steps[0], from - pad), "xaxis.range[1]": Math.min(steps.at(-1), step + pad) });
}

let marked = null; // lines of the two kinds, worked out once for all curves

function eventMarks() {
  const byStep = new Map();
  for (const event of RUN.events.events.filter(isMarked)) byStep.set(event.step, [...(byStep.get(event.step) ?? []), event]);
  const warned = ([, events]) => events.every(({ action }) => !["stop", "roll_back"].includes(action));
  const marks = [...byStep].sort(([a], [b]) => a - b);
  return [
    ["--warn", marks.filter(warned)],
    ["--bad", marks.filter((mark) => !warned(mark))],
  ]
    .filter(([, some]) => some.length)
    .map(([hue, some]) => {
      const said = some.map(([, events]) => events.slice(0, 3).map(eventLabel).join("<br>"));
      return {
        hue,
        x: some.flatMap(([step]) => [step, step, null]),
        y: some.flatMap(() => [1, 0, null]),
        text: said.flatMap((text) => [text, text, ""]),
        sizes: some.length <= MAX_SIGNS && some.flatMap(() => [6, 0, 0]),
      };
    });
}

// A thin line at each step with events, and what was said there under the pointer: one path for all warnings, one for what ended the run.
function eventTraces() {
  marked ??= eventMarks();
  return marked.map(({ hue, x, y, text, sizes }) => ({
    x,
    y,
    text,
    yaxis: "y2",
    name: "",
    mode: sizes ? "lines+markers" : "lines",
    opacity: 0.75,
    line: { color: css(hue), width: 1, dash: "dot" },
    marker: { color: css(hue), symbol: "triangle-down", size: sizes || 0, line: { width: 0 } },
    hovertemplate: "%{text}<extra></extra>",
    cliponaxis: false,
  }));
}

// As text that Plotly, which reads some tags, shows as it is.
function eventLabel({ action, monitor, what }) {
  const label = Object.hasOwn(ACTIONS, action) ? ACTIONS[action][0] : action;
  const words = plainText(`${label}, ${monitor}: ${what}`).slice(0, 3 * WORDS_PER_LINE);
  const lines = words.match(new RegExp(`.{1,${WORDS_PER_LINE}}(?:\\s|$)|.{1,${WORDS_PER_LINE}}`, "gs")) ?? [];
  return lines.map((line) => line.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")).join("<br>");
}

// Text for places that take no elements: hidden characters as their code points.
function plainText(text) {
  const hidden = new RegExp(HIDDEN_CHARACTERS.source, "g");
  return text.replace(hidden, (letter) => (/\s/.test(letter) ? " " : `U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
}
