// Latents: where responses lie among each other, drawn on a canvas, and whether right and wrong ones lie apart.

const KINDS = [
  // by verdict code: name, hue, shape
  ["right", "--series-1", "disc"],
  ["wrong", "--series-2", "cross"],
  ["not graded", "--muted", "square"],
];
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
    reading: "How often a right response lies further along the line than a wrong one of its step; 0.5: no better than chance. A step needs 5 of each.",
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
    reading: "How far the middle of a step's responses is from that of the first steps; below the second line it may be chance.",
  },
];
const FRAMES = 60; // positions of the slider, at most
const FRAME_MS = 220;
const TRAIL = 8; // frames that a mean is taken over
const REACH = 14; // pixels around the pointer

const map = { points: null, frames: [], at: 0, playing: 0, all: true, centre: [0, 0], extent: [1, 1] };
let latentsShown = false;

async function showLatents() {
  if (latentsShown) return;
  latentsShown = true;
  const view = byId("latents");
  const { missing, explained, numResponses, numPoints, verdicts } = RUN.latents;
  if (missing || !CAN_UNPACK) {
    view.append(h("p", { class: "empty" }, missing || "This browser cannot unpack the latents: use one of 2023 or later."));
    view.dataset.drawn = "true";
    return;
  }
  [map.points] = await unpack("latent-points");
  map.frames = latentFrames();
  const wanted = Number(readAddress().settings.get("step") ?? Infinity);
  map.at = Math.max(0, map.frames.findLastIndex(({ first }) => first <= wanted));
  const queue = [];
  const curves = LATENT_CHARTS.filter((chart) => chartLines(chart).length).map((chart) => figureCard(chart, queue, chart.reading));
  const shown = numPoints < numResponses ? `${count(numPoints)} of ${plural(numResponses, "logged response")}` : plural(numResponses, "logged response");
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
          h("h3", {}, "Responses in latent space", h("small", {}, ` ${shown}; the two directions of most variance, fixed for the run`)),
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
        h("p", { class: "hint axes" }, `→ ${percent(explained[0])} of the variance · ↑ ${percent(explained[1])}`),
        frameBar(),
      ),
      h("div", { class: "latent-curves" }, curves),
    ),
  );
  new ResizeObserver(drawMap).observe(byId("latent-map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  chooseFrame(map.at);
  drawQueue(queue, view);
}

// Windows of steps, one after the other, as many as the slider has positions; and the sums over right and over wrong answers in each.
function latentFrames() {
  const { step, x, y, verdict } = map.points;
  const steps = [...new Set(step)];
  const each = Math.ceil(steps.length / FRAMES);
  const frames = [];
  for (let at = 0; at < steps.length; at += each) frames.push({ first: steps[at], last: steps[Math.min(at + each, steps.length) - 1], points: [] });
  const frameOf = new Map(steps.map((name, at) => [name, frames[Math.floor(at / each)]]));
  step.forEach((name, at) => frameOf.get(name).points.push(at));
  for (const frame of frames) {
    frame.sums = [0, 1].map((code) => {
      const members = frame.points.filter((at) => verdict[at] === code);
      return [members.length, sum(members.map((at) => x[at])), sum(members.map((at) => y[at]))];
    });
  }
  // The middle and half of the extent without the outermost percent, so that one stray response does not make specks of the others.
  const range = (values) => {
    const sorted = values.slice().sort((a, b) => a - b);
    return [sorted[Math.floor(0.005 * (sorted.length - 1))], sorted[Math.ceil(0.995 * (sorted.length - 1))]];
  };
  const [[left, right], [low, high]] = [range(x), range(y)];
  map.centre = [(left + right) / 2, (low + high) / 2];
  map.extent = [Math.max(right - left, 1e-9), Math.max(high - low, 1e-9)];
  return frames;
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
    h("span", {}, h("i", { class: "shape ring" }), "mean of the last right and wrong answers, and its way"),
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
  map.playing = 0;
  byId("latent-play").textContent = "▶ Play";
}

// The address holds the first of the steps shown; none for the latest.
function rememberFrame() {
  if (byId("latents").hidden) return;
  writeAddress("latents", { step: map.at < map.frames.length - 1 ? map.frames[map.at].first : null });
}

function chooseFrame(at) {
  map.at = at;
  const { first, last, points } = map.frames[at];
  byId("latent-step").value = at;
  byId("latent-frame").textContent = `${first === last ? `step ${first}` : `steps ${first}–${last}`} · ${plural(points.length, "response")}`;
  hidePoint();
  drawMap();
}

// Where a point of the plane lies on the canvas, in CSS pixels; the same scale along both axes.
function onMap([x, y]) {
  const { clientWidth: width, clientHeight: height } = byId("latent-map");
  const scale = 0.9 * Math.min(width / map.extent[0], height / map.extent[1]);
  return [width / 2 + scale * (x - map.centre[0]), height / 2 - scale * (y - map.centre[1])];
}

const pointPlace = (at) => onMap([map.points.x[at], map.points.y[at]]);

function drawMap() {
  const canvas = byId("latent-map");
  if (!canvas?.clientWidth) return;
  const ratio = devicePixelRatio || 1;
  canvas.width = ratio * canvas.clientWidth;
  canvas.height = ratio * canvas.clientHeight;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.lineWidth = 1.6;
  const { verdict } = map.points;
  const hues = KINDS.map(([, hue]) => css(hue));
  const now = new Set(map.frames[map.at].points);
  if (map.all) {
    pen.globalAlpha = 0.13;
    for (let at = 0; at < verdict.length; at++) if (!now.has(at)) drawPoint(pen, KINDS[verdict[at]][2], pointPlace(at), hues[verdict[at]], 2.4);
  }
  pen.globalAlpha = 0.85;
  for (const at of now) drawPoint(pen, KINDS[verdict[at]][2], pointPlace(at), hues[verdict[at]], 3.6);
  pen.globalAlpha = 1;
  for (const code of [1, 0]) drawTrail(pen, code, hues[code]);
  canvas.dataset.shown = String(now.size);
}

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

// The way of a mean up to the steps shown, at each place over TRAIL frames, and a large mark at its end.
function drawTrail(pen, code, hue) {
  const way = [];
  for (let at = 0; at <= map.at; at++) {
    const near = map.frames.slice(Math.max(0, at + 1 - TRAIL), at + 1).map(({ sums }) => sums[code]);
    const [number, x, y] = [0, 1, 2].map((part) => sum(near.map((sums) => sums[part])));
    if (number >= 2) way.push(onMap([x / number, y / number]));
  }
  if (!way.length) return;
  pen.lineJoin = "round";
  for (const [colour, width] of [
    [css("--card"), 4.5],
    [hue, 2],
  ]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    way.forEach(([x, y], at) => (at ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  }
  const [x, y] = way.at(-1);
  pen.fillStyle = hue;
  pen.strokeStyle = css("--card");
  pen.lineWidth = 2.5;
  pen.beginPath();
  if (code === 0) pen.arc(x, y, 9, 0, 2 * Math.PI);
  else pen.rect(x - 8, y - 8, 16, 16);
  pen.fill();
  pen.stroke();
  drawPoint(Object.assign(pen, { lineWidth: 2 }), code === 0 ? "disc" : "cross", [x, y], css("--card"), code === 0 ? 2.5 : 3.5);
  pen.lineWidth = 1.6;
}

// The point of the shown steps nearest to the pointer.
function pointAt(event) {
  const box = byId("latent-map").getBoundingClientRect();
  const distance = (at) => {
    const [x, y] = pointPlace(at);
    return Math.hypot(x - (event.clientX - box.left), y - (event.clientY - box.top));
  };
  let [nearest, least] = [null, REACH];
  for (const at of map.frames[map.at].points) if (distance(at) < least) [nearest, least] = [at, distance(at)];
  return nearest;
}

function showPoint(event) {
  const at = pointAt(event);
  if (at === null) return hidePoint();
  const { points } = map;
  const row = (label, value) => h("tr", {}, h("td", {}, label), h("td", {}, value));
  const tip = byId("tooltip");
  tip.hidden = false;
  tip.replaceChildren(
    h("p", { class: "asked-here", dir: "auto" }, points.questions[points.question[at]].replaceAll("<image>", "▣ ") || "no question"),
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
    h("p", {}, points.group[at] === null ? "not on this page: see the folder rollouts/" : "click to read it"),
  );
  const left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${left + scrollX}px`;
  const below = event.clientY + 16;
  tip.style.top = `${(below + tip.offsetHeight < innerHeight ? below : Math.max(8, event.clientY - 16 - tip.offsetHeight)) + scrollY}px`;
  byId("latent-map").style.cursor = points.group[at] === null ? "" : "pointer";
}

function hidePoint() {
  byId("tooltip").hidden = true;
  byId("latent-map").style.cursor = "";
}

function openPoint(event) {
  const at = pointAt(event);
  const { step, group, response } = map.points;
  if (at === null || group[at] === null) return;
  hidePoint();
  openRollout({ step: step[at], group: group[at], response: response[at] });
}
