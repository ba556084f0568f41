// Where a token looked: a heat map over the pictures of its group. One token at a time can be
// pinned, on the whole page.

import { byId, h, part, parts } from "./dom.js";
import { percent, plural } from "./format.js";
import { heat, heatRamp, strengths } from "./heat.js";
import { browser, rememberSettings, traces } from "./rollout_store.js";
import { RUN } from "./run_data.js";
import { CAN_UNPACK, inflated } from "./unpack.js";

/** @import { AttentionData, ResponseTokens } from "./data" */
/** @import { PageEvent, Part } from "./types" */

/**
 * @type {{
 *   card: Part | null,
 *   text: Part | null,
 *   at: number | null,
 *   release: (() => void) | null,
 * }}
 */
const pin = { card: null, text: null, at: null, release: null };

/** @type {WeakMap<AttentionData, Promise<Uint8Array>>} */
const cellsOf = new WeakMap(); // attention of a response -> a promise of a byte per token and cell

/** @param {AttentionData} attention */
function unpackCells(attention) {
  const known = cellsOf.get(attention);
  if (known) return known;
  const cells = inflated(attention.cells, "deflate")
    .arrayBuffer()
    .then((buffer) => new Uint8Array(buffer));
  cellsOf.set(attention, cells);
  return cells;
}

/**
 * @param {Part} canvas
 * @param {[number, number]} grid
 * @param {number[]} values
 */
function drawHeat(canvas, [rows, columns], values) {
  canvas.width = columns;
  canvas.height = rows;
  const pixels = new ImageData(columns, rows);
  values.forEach((value, cell) => {
    const [red, green, blue, opacity] = heat(value);
    pixels.data.set([red, green, blue, 255 * opacity], 4 * cell);
  });
  canvas.getContext("2d")?.putImageData(pixels, 0, 0);
}

/**
 * A heat map needs room: small pictures are shown larger than elsewhere.
 * @param {{ target: Part }} event
 */
function enlargeFrame({ target }) {
  const times = Math.min(360 / target.naturalWidth, 180 / target.naturalHeight);
  if (times > 1 && !target.style.width)
    target.style.width = `${Math.round(times * target.naturalWidth)}px`;
}

/**
 * Makes the tokens of a group's card show where they looked, where a run has written it down.
 * @param {Part} card
 * @param {ResponseTokens[]} tokens
 */
export function attributable(card, tokens) {
  if (!tokens.some((trace) => trace?.attention) || !CAN_UNPACK) return card;
  const frames = /** @type {Part[]} */ ([...part(card, ".pictures").children]).map((image) => {
    const canvas = h("canvas", { class: "heat", width: 1, height: 1, "aria-hidden": "true" });
    const frame = h("div", { class: "framed" });
    image.replaceWith(frame);
    frame.append(image);
    if (image.matches("img")) {
      frame.append(canvas);
      image.addEventListener("load", () => enlargeFrame({ target: image }));
    }
    return canvas;
  });
  const words = h("p", { class: "words" });
  const ramp = h("i", { class: "ramp" });
  ramp.style.backgroundImage = heatRamp();
  const legend = h(
    "div",
    { class: "legend" },
    h("span", {}, "none"),
    ramp,
    h("span", {}, "where it looked most"),
  );
  part(card, ".task").append(h("div", { class: "look" }, words, legend));
  card.classList.add("attributed");
  const toolbar = byId("rollouts").querySelector(".toolbar");
  document.documentElement.style.setProperty("--toolbar-height", `${toolbar?.offsetHeight ?? 0}px`);

  /** @type {Part | null} */
  let last = null; // the text whose tokens were pointed at last
  let drawing = 0;
  const texts = () => parts(card, ".text").filter((text) => traces.get(text)?.attention);

  // Shows a token, the mean over a response (`at` null), or nothing (`text` null).
  const show = async (/** @type {Part | null} */ text, /** @type {number | null} */ at) => {
    const turn = ++drawing;
    for (const node of parts(card, ".looking, .pinned")) node.classList.remove("looking", "pinned");
    card.dataset.looking = text ? String(at ?? "mean") : "";
    const trace = text && traces.get(text);
    if (!trace?.attention) {
      for (const canvas of frames) canvas.width = canvas.height = 1; // clears it
      words.replaceChildren("Point at a token: where did the model look when it chose it?");
      return;
    }
    last = text;
    const { attention, tokens: said } = trace;
    const pinned = pin.text === text && pin.at === at;
    const node = at === null ? null : text?.querySelector(`.token[data-at="${at}"]`);
    node?.classList.add("looking", ...(pinned ? ["pinned"] : []));
    const name = attention.grids.length > 1 ? "the pictures" : "the picture";
    const mean = attention.share.reduce((total, part) => total + part, 0) / attention.share.length;
    words.replaceChildren(
      ...(at === null
        ? ["Mean over ", plural(said.length, "token"), ": "]
        : [h("code", {}, JSON.stringify(said[at])), " "]),
      h("b", {}, percent(at === null ? mean : attention.share[at])),
      at === null
        ? ` of their attention is on ${name}.`
        : ` of this token's attention is on ${name}.`,
      ...(at === null
        ? []
        : [h("span", {}, pinned ? " Pinned: Escape releases, ← → move on." : " A click pins it.")]),
    );
    const values = strengths(await unpackCells(attention), attention, at);
    if (turn !== drawing) return; // overtaken
    let first = 0;
    attention.grids.forEach((grid, number) => {
      const size = grid[0] * grid[1];
      if (frames[number]?.isConnected)
        drawHeat(frames[number], grid, values.slice(first, first + size));
      first += size;
    });
    card.dataset.drawn = card.dataset.looking;
  };
  const tokenOf = (/** @type {Part | null} */ target) => {
    const node = target?.closest(".token");
    const text = node?.closest(".text");
    return node && text && traces.get(text)?.attention
      ? { text, at: Number(node.dataset.at) }
      : null;
  };
  const listen = (/** @type {string} */ name, /** @type {(event: PageEvent) => void} */ heard) =>
    card.addEventListener(name, /** @type {(event: any) => void} */ (heard));
  const isPinned = () => pin.card === card;
  const rest = () => {
    if (isPinned()) return;
    const under = tokenOf(card.querySelector(".token:hover"));
    if (under) {
      show(under.text, under.at);
      return;
    }
    const text =
      browser.settings.attention === "mean" ? (last?.isConnected ? last : texts()[0]) : null;
    show(text ?? null, null);
  };
  const setPin = (/** @type {Part} */ text, /** @type {number} */ at) => {
    if (pin.card !== card) pin.release?.();
    Object.assign(pin, { card, text, at, release });
    show(text, at);
  };
  const release = () => {
    Object.assign(pin, { card: null, text: null, at: null, release: null });
    rest();
  };
  listen("pointerover", (event) => {
    const found = tokenOf(event.target);
    if (isPinned()) return;
    if (found) show(found.text, found.at);
    else {
      last =
        texts().find((text) => text.closest(".response") === event.target.closest(".response")) ??
        last;
      rest();
    }
  });
  card.addEventListener("pointerleave", rest);
  listen("click", (event) => {
    const found = tokenOf(event.target);
    if (!found) return;
    if (pin.text === found.text && pin.at === found.at) release();
    else setPin(found.text, found.at);
  });
  listen("focusin", (event) => {
    if (
      event.target.matches(".text:focus-visible") &&
      traces.get(event.target)?.attention &&
      !isPinned()
    )
      setPin(event.target, 0);
  });
  listen("keydown", (event) => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    const text = event.target.closest(".text");
    if (
      !step ||
      !text ||
      event.altKey ||
      event.ctrlKey ||
      event.metaKey ||
      !traces.get(text)?.attention
    )
      return;
    event.preventDefault();
    event.stopPropagation(); // the arrows turn pages elsewhere
    const shown = text.querySelectorAll(".token").length;
    const at = pin.text === text ? Number(pin.at) + step : 0;
    setPin(text, Math.min(shown - 1, Math.max(0, at)));
    text.querySelector(`.token[data-at="${pin.at}"]`)?.scrollIntoView({ block: "nearest" });
  });
  card.restLooking = rest;
  rest();
  return card;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("lightbox").open) pin.release?.();
});

// The switch of the toolbar: what is shown while nothing is pointed at.
export function attentionSwitch() {
  const { numAttention, numAttentionLeftOut } = RUN.rollouts;
  if (!numAttention) return null;
  const left = numAttentionLeftOut
    ? `; that of ${plural(numAttentionLeftOut, "more response")} stayed in the folder rollouts/`
    : "";
  return h(
    "label",
    {
      title:
        `${plural(numAttention, "response")} on this page come with where their tokens ` +
        `looked${left}`,
    },
    h("input", {
      type: "checkbox",
      id: "choose-attention",
      onchange: (event) => {
        browser.settings.attention = event.target.checked ? "mean" : "";
        for (const card of parts(document, "#groups .attributed")) card.restLooking();
        rememberSettings();
      },
    }),
    " Mean attention",
  );
}
