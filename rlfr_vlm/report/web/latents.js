// Latents: where responses lie among each other, drawn on a canvas, and whether right and wrong
// ones lie apart.

import { byId, css, h } from "./dom.js";
import { verdictPanel } from "./flow.js";
import { count, figure, percent, plural } from "./format.js";
import { latentFrames, span, trail } from "./frames.js";
import { openRollout } from "./rollouts.js";
import { chartLines, runCharts } from "./run_charts.js";
import { RUN } from "./run_data.js";
import { readAddress, writeAddress } from "./tabs.js";
import { CAN_UNPACK, unpack } from "./unpack.js";

/** @import { LatentPoints } from "./data" */
/** @import { Frame, PageEvent, Queue, Range, RunChart } from "./types" */

const KINDS = [
  // by verdict code: name, hue, shape
  ["right", "--series-1", "disc"],
  ["wrong", "--series-2", "cross"],
  ["not graded", "--muted", "square"],
];

/** @type {RunChart[]} */
const LATENT_CHARTS = [
  {
    title: "Right and wrong lie apart",
    unit: "AUC of a line fitted on other steps",
    source: "latents",
    lines: [
      ["auc", "all pairs"],
      ["auc_in_group", "siblings"],
    ],
    level: 0.5,
    reading:
      "How often a right response lies further along the line than a wrong one of its step; " +
      "0.5: no better than chance. A step needs 5 of each.",
  },
  {
    title: "Drift of the centroid",
    unit: "in spreads of the first steps",
    source: "latents",
    fromZero: true,
    lines: [
      ["drift", "from the first steps"],
      ["drift_chance", "by the draw of questions alone"],
    ],
    reading:
      "How far the middle of a step's responses is from that of the first steps; below the " +
      "second line it may be chance.",
  },
];

const FRAME_MS = 220;

const REACH = 14; // pixels around the pointer

/** @type {LatentPoints} */
const NO_POINTS = {
  ...{ x: [], y: [], step: [], verdict: [], group: [], response: [] },
  ...{ reward: [], prediction: [], question: [], questions: [] },
};

/**
 * @type {{
 *   points: LatentPoints,
 *   frames: Frame[],
 *   at: number,
 *   playing: ReturnType<typeof setInterval> | undefined,
 *   all: boolean,
 *   centre: Range,
 *   extent: Range,
 * }}
 */
const map = {
  points: NO_POINTS,
  frames: [],
  at: 0,
  playing: undefined,
  all: true,
  centre: [0, 0],
  extent: [1, 1],
};

export async function showLatents() {
  const view = byId("latents");
  if ("missing" in RUN.latents || !CAN_UNPACK) {
    const missing = "missing" in RUN.latents && RUN.latents.missing;
    view.append(
      h(
        "p",
        { class: "empty" },
        missing || "This browser cannot unpack the latents: use one of 2023 or later.",
      ),
    );
    view.dataset.drawn = "true";
    return;
  }
  [map.points] = await unpack("latent-points");
  const { explained, numResponses, numPoints, verdicts } = RUN.latents;
  map.frames = latentFrames(map.points);
  const [across, up] = [span(map.points.x), span(map.points.y)];
  map.centre = [across.centre, up.centre];
  map.extent = [across.extent, up.extent];
  const wanted = Number(readAddress().settings.get("step") ?? Infinity);
  map.at = Math.max(
    0,
    map.frames.findLastIndex(({ first }) => first <= wanted),
  );
  /** @type {Queue<RunChart>} */
  const queue = [];
  const curves = LATENT_CHARTS.filter((chart) => chartLines(chart).length).map((chart) =>
    runCharts.card(chart, queue, chart.reading),
  );
  const shown =
    numPoints < numResponses
      ? `${count(numPoints)} of ${plural(numResponses, "logged response")}`
      : plural(numResponses, "logged response");
  view.append(
    verdictPanel(verdicts),
    h(
      "div",
      { class: "latent-columns" },
      h(
        "figure",
        { class: "card" },
        h(
          "figcaption",
          {},
          h(
            "h3",
            {},
            "Responses in latent space",
            h("small", {}, ` ${shown}; the two directions of most variance, fixed for the run`),
          ),
        ),
        mapKey(),
        h("canvas", {
          id: "latent-map",
          role: "img",
          "aria-label": "responses as points in two dimensions; the slider below chooses the steps",
          onpointermove: showPoint,
          onpointerleave: hidePoint,
          onclick: openPoint,
        }),
        h(
          "p",
          { class: "hint axes" },
          `→ ${percent(explained[0])} of the variance · ↑ ${percent(explained[1])}`,
        ),
        frameBar(),
      ),
      h("div", { class: "latent-curves" }, curves),
    ),
  );
  new ResizeObserver(drawMap).observe(byId("latent-map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  chooseFrame(map.at);
  runCharts.drawQueue(queue, view);
}

function mapKey() {
  const present = new Set(map.points.verdict);
  return h(
    "p",
    { class: "chart-key" },
    KINDS.map(([label, hue, shape], code) => {
      if (!present.has(code)) return null;
      const sign = h("i", { class: `shape ${shape}` });
      sign.style.color = `var(${hue})`;
      return h("span", {}, sign, label);
    }),
    h(
      "span",
      {},
      h("i", { class: "shape ring" }),
      "mean of the last right and wrong answers, and its way",
    ),
  );
}

function frameBar() {
  const last = map.frames.length - 1;
  return h(
    "div",
    { class: "bar frame-bar" },
    h("button", { class: "more", id: "latent-play", onclick: play, disabled: last < 1 }, "▶ Play"),
    h("input", {
      type: "range",
      id: "latent-step",
      min: 0,
      max: last,
      value: map.at,
      disabled: last < 1,
      "aria-label": "steps shown",
      oninput: (event) => {
        stopPlaying();
        chooseFrame(Number(event.target.value));
        rememberFrame();
      },
    }),
    h("output", { id: "latent-frame" }),
    h(
      "label",
      {},
      h("input", {
        type: "checkbox",
        id: "latent-all",
        checked: map.all,
        onchange: (event) => {
          map.all = event.target.checked;
          drawMap();
        },
      }),
      " others faint",
    ),
  );
}

function play() {
  if (map.playing) return stopPlaying();
  if (map.at === map.frames.length - 1) chooseFrame(0);
  byId("latent-play").textContent = "❚❚ Pause";
  map.playing = setInterval(() => {
    if (map.at >= map.frames.length - 1 || byId("latents").hidden) stopPlaying();
    else chooseFrame(map.at + 1);
  }, FRAME_MS);
}

function stopPlaying() {
  if (map.playing) rememberFrame();
  clearInterval(map.playing);
  map.playing = undefined;
  byId("latent-play").textContent = "▶ Play";
}

// The address holds the first of the steps shown; none for the latest.
function rememberFrame() {
  if (byId("latents").hidden) return;
  writeAddress("latents", {
    step: map.at < map.frames.length - 1 ? map.frames[map.at].first : null,
  });
}

/** @param {number} at */
function chooseFrame(at) {
  map.at = at;
  const { first, last, points } = map.frames[at];
  byId("latent-step").value = String(at);
  const steps = first === last ? `step ${first}` : `steps ${first}–${last}`;
  byId("latent-frame").textContent = `${steps} · ${plural(points.length, "response")}`;
  hidePoint();
  drawMap();
}

/**
 * Where a point of the plane lies on the canvas, in CSS pixels; the same scale along both axes.
 * @param {Range} place
 * @returns {Range}
 */
function onMap([x, y]) {
  const { clientWidth: width, clientHeight: height } = byId("latent-map");
  const scale = 0.9 * Math.min(width / map.extent[0], height / map.extent[1]);
  return [width / 2 + scale * (x - map.centre[0]), height / 2 - scale * (y - map.centre[1])];
}

const pointPlace = (/** @type {number} */ at) => onMap([map.points.x[at], map.points.y[at]]);

function drawMap() {
  const canvas = byId("latent-map");
  if (!canvas?.clientWidth) return;
  const ratio = devicePixelRatio || 1;
  canvas.width = ratio * canvas.clientWidth;
  canvas.height = ratio * canvas.clientHeight;
  const pen = canvas.getContext("2d");
  if (!pen) return;
  pen.scale(ratio, ratio);
  pen.lineWidth = 1.6;
  const { verdict } = map.points;
  const hues = KINDS.map(([, hue]) => css(hue));
  const now = new Set(map.frames[map.at].points);
  if (map.all) {
    pen.globalAlpha = 0.13;
    for (let at = 0; at < verdict.length; at++)
      if (!now.has(at))
        drawPoint(pen, KINDS[verdict[at]][2], pointPlace(at), hues[verdict[at]], 2.4);
  }
  pen.globalAlpha = 0.85;
  for (const at of now)
    drawPoint(pen, KINDS[verdict[at]][2], pointPlace(at), hues[verdict[at]], 3.6);
  pen.globalAlpha = 1;
  for (const code of [1, 0]) drawTrail(pen, code, hues[code]);
  canvas.dataset.shown = String(now.size);
}

/**
 * @param {CanvasRenderingContext2D} pen
 * @param {string} shape
 * @param {Range} place
 * @param {string} hue
 * @param {number} size
 */
function drawPoint(pen, shape, [x, y], hue, size) {
  pen.fillStyle = pen.strokeStyle = hue;
  pen.beginPath();
  if (shape === "disc") {
    pen.arc(x, y, size, 0, 2 * Math.PI);
    pen.fill();
  } else if (shape === "cross") {
    pen.moveTo(x - size, y - size);
    pen.lineTo(x + size, y + size);
    pen.moveTo(x - size, y + size);
    pen.lineTo(x + size, y - size);
    pen.stroke();
  } else pen.strokeRect(x - size, y - size, 2 * size, 2 * size);
}

/**
 * The way of a mean up to the steps shown, and a large mark at its end.
 * @param {CanvasRenderingContext2D} pen
 * @param {number} code
 * @param {string} hue
 */
function drawTrail(pen, code, hue) {
  const way = trail(map.frames, map.at, code).map(onMap);
  if (!way.length) return;
  pen.lineJoin = "round";
  for (const { colour, width } of [
    { colour: css("--card"), width: 4.5 },
    { colour: hue, width: 2 },
  ]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    way.forEach(([x, y], at) => (at ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  }
  const [x, y] = way[way.length - 1];
  pen.fillStyle = hue;
  pen.strokeStyle = css("--card");
  pen.lineWidth = 2.5;
  pen.beginPath();
  if (code === 0) pen.arc(x, y, 9, 0, 2 * Math.PI);
  else pen.rect(x - 8, y - 8, 16, 16);
  pen.fill();
  pen.stroke();
  drawPoint(
    Object.assign(pen, { lineWidth: 2 }),
    code === 0 ? "disc" : "cross",
    [x, y],
    css("--card"),
    code === 0 ? 2.5 : 3.5,
  );
  pen.lineWidth = 1.6;
}

/**
 * The point of the shown steps nearest to the pointer.
 * @param {PageEvent} event
 */
function pointAt(event) {
  const box = byId("latent-map").getBoundingClientRect();
  const distance = (/** @type {number} */ at) => {
    const [x, y] = pointPlace(at);
    return Math.hypot(x - (event.clientX - box.left), y - (event.clientY - box.top));
  };
  /** @type {number | null} */
  let nearest = null;
  let least = REACH;
  for (const at of map.frames[map.at].points)
    if (distance(at) < least) [nearest, least] = [at, distance(at)];
  return nearest;
}

/** @param {PageEvent} event */
function showPoint(event) {
  const at = pointAt(event);
  if (at === null) {
    hidePoint();
    return;
  }
  const { points } = map;
  const row = (/** @type {string} */ label, /** @type {string} */ value) =>
    h("tr", {}, h("td", {}, label), h("td", {}, value));
  const tip = byId("tooltip");
  tip.hidden = false;
  tip.replaceChildren(
    h(
      "p",
      { class: "asked-here", dir: "auto" },
      points.questions[points.question[at]].replaceAll("<image>", "▣ ") || "no question",
    ),
    h(
      "table",
      {},
      h(
        "tbody",
        {},
        row("step", String(points.step[at])),
        row("answer", KINDS[points.verdict[at]][0]),
        row("read as", points.prediction[at] || "–"),
        row("reward", figure(points.reward[at])),
      ),
    ),
    h(
      "p",
      {},
      points.group[at] === null ? "not on this page: see the folder rollouts/" : "click to read it",
    ),
  );
  const left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${left + scrollX}px`;
  const below = event.clientY + 16;
  const above = Math.max(8, event.clientY - 16 - tip.offsetHeight);
  tip.style.top = `${(below + tip.offsetHeight < innerHeight ? below : above) + scrollY}px`;
  byId("latent-map").style.cursor = points.group[at] === null ? "" : "pointer";
}

function hidePoint() {
  byId("tooltip").hidden = true;
  byId("latent-map").style.cursor = "";
}

/** @param {PageEvent} event */
function openPoint(event) {
  const at = pointAt(event);
  const { step, group, response } = map.points;
  const place = at === null ? null : group[at];
  if (at === null || place === null) return;
  hidePoint();
  openRollout({ step: step[at], group: place, response: response[at] });
}
