// Where a token looked: a heat map over the pictures of its group. One token at a time can be pinned, on the whole page.

const HEAT = [
  // strength -> red, green, blue, opacity: visible on dark and on light pictures, which stay visible under it
  [0, [92, 60, 210, 0]],
  [0.2, [110, 50, 215, 0.22]],
  [0.6, [222, 0, 122, 0.5]],
  [1, [255, 92, 0, 0.68]],
];
const pin = { card: null, text: null, at: null, release: null };
const cellsOf = new WeakMap(); // attention of a response -> a promise of a byte per token and cell

function heat(strength) {
  const after = Math.max(
    1,
    HEAT.findIndex(([at]) => at >= strength),
  );
  const [[low, from], [high, to]] = [HEAT[after - 1], HEAT[after]];
  const part = (strength - low) / (high - low);
  return from.map((value, number) => value + part * (to[number] - value));
}

const heatRamp = () =>
  `linear-gradient(to right, ${HEAT.map(([at, [r, g, b, opacity]]) => `rgb(${r} ${g} ${b} / ${opacity}) ${100 * at}%`).join(", ")})`;

function unpackCells(attention) {
  if (!cellsOf.has(attention)) {
    const bytes = Uint8Array.from(atob(attention.cells), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    cellsOf.set(
      attention,
      new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)),
    );
  }
  return cellsOf.get(attention);
}

// Strengths from 0 to 1 of one token, or of the mean over tokens, each cell of which is a share of all their attention.
function strengths(cells, { share }, at) {
  const size = cells.length / share.length;
  if (at !== null) return Array.from(cells.subarray(at * size, (at + 1) * size), (value) => value / 255);
  const mean = new Array(size).fill(0);
  share.forEach((part, token) => {
    const own = cells.subarray(token * size, (token + 1) * size);
    const total = own.reduce((before, value) => before + value, 0) || 1;
    own.forEach((value, cell) => {
      mean[cell] += (part * value) / total;
    });
  });
  const most = Math.max(...mean) || 1;
  return mean.map((value) => value / most);
}

function drawHeat(canvas, [rows, columns], values) {
  canvas.width = columns;
  canvas.height = rows;
  const pixels = new ImageData(columns, rows);
  values.forEach((value, cell) => {
    const [red, green, blue, opacity] = heat(value);
    pixels.data.set([red, green, blue, 255 * opacity], 4 * cell);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// A heat map needs room: small pictures are shown larger than elsewhere.
function enlargeFrame({ target }) {
  const times = Math.min(360 / target.naturalWidth, 180 / target.naturalHeight);
  if (times > 1 && !target.style.width) target.style.width = `${Math.round(times * target.naturalWidth)}px`;
}

// Makes the tokens of a group's card show where they looked, where a run has written it down.
function attributable(card, tokens) {
  if (!tokens.some((trace) => trace?.attention) || !CAN_UNPACK) return card;
  const frames = [...card.querySelector(".pictures").children].map((image) => {
    const canvas = h("canvas", { class: "heat", width: 1, height: 1, "aria-hidden": "true" });
    const frame = h("div", { class: "framed" });
    image.replaceWith(frame);
    frame.append(image);
    if (image.matches("img")) {
      frame.append(canvas);
      image.addEventListener("load", enlargeFrame);
    }
    return canvas;
  });
  const words = h("p", { class: "words" });
  const ramp = h("i", { class: "ramp" });
  ramp.style.backgroundImage = heatRamp();
  const legend = h("div", { class: "legend" }, h("span", {}, "none"), ramp, h("span", {}, "where it looked most"));
  card.querySelector(".task").append(h("div", { class: "look" }, words, legend));
  card.classList.add("attributed");
  const toolbar = byId("rollouts").querySelector(".toolbar");
  document.documentElement.style.setProperty("--toolbar-height", `${toolbar?.offsetHeight ?? 0}px`);

  let last = null; // the text whose tokens were pointed at last
  let drawing = 0;
  const texts = () => [...card.querySelectorAll(".text")].filter((text) => traces.get(text)?.attention);

  // Shows a token, the mean over a response (`at` null), or nothing (`text` null).
  const show = async (text, at) => {
    const turn = ++drawing;
    for (const node of card.querySelectorAll(".looking, .pinned")) node.classList.remove("looking", "pinned");
    card.dataset.looking = text ? (at ?? "mean") : "";
    if (!text) {
      for (const canvas of frames) canvas.width = canvas.height = 1; // clears it
      words.replaceChildren("Point at a token: where did the model look when it chose it?");
      return;
    }
    last = text;
    const { attention, tokens: said } = traces.get(text);
    const pinned = pin.text === text && pin.at === at;
    const node = at === null ? null : text.querySelector(`.token[data-at="${at}"]`);
    node?.classList.add("looking", ...(pinned ? ["pinned"] : []));
    const name = attention.grids.length > 1 ? "the pictures" : "the picture";
    const mean = attention.share.reduce((total, part) => total + part, 0) / attention.share.length;
    words.replaceChildren(
      ...(at === null ? ["Mean over ", plural(said.length, "token"), ": "] : [h("code", {}, JSON.stringify(said[at])), " "]),
      h("b", {}, percent(at === null ? mean : attention.share[at])),
      at === null ? ` of their attention is on ${name}.` : ` of this token's attention is on ${name}.`,
      ...(at === null ? [] : [h("span", {}, pinned ? " Pinned: Escape releases, ← → move on." : " A click pins it.")]),
    );
    const values = strengths(await unpackCells(attention), attention, at);
    if (turn !== drawing) return; // overtaken
    let first = 0;
    attention.grids.forEach((grid, number) => {
      const size = grid[0] * grid[1];
      if (frames[number]?.isConnected) drawHeat(frames[number], grid, values.slice(first, first + size));
      first += size;
    });
    card.dataset.drawn = card.dataset.looking;
  };
  const tokenOf = (target) => {
    const node = target?.closest(".token");
    const text = node?.closest(".text");
    return text && traces.get(text)?.attention ? { text, at: Number(node.dataset.at) } : null;
  };
  const isPinned = () => pin.card === card;
  const rest = () => {
    if (isPinned()) return;
    const under = tokenOf(card.querySelector(".token:hover"));
    if (under) {
      show(under.text, under.at);
      return;
    }
    const text = browser.settings.attention === "mean" ? (last?.isConnected ? last : texts()[0]) : null;
    show(text ?? null, null);
  };
  const setPin = (text, at) => {
    if (pin.card !== card) pin.release?.();
    Object.assign(pin, { card, text, at, release });
    show(text, at);
  };
  const release = () => {
    Object.assign(pin, { card: null, text: null, at: null, release: null });
    rest();
  };
  card.addEventListener("pointerover", (event) => {
    const found = tokenOf(event.target);
    if (isPinned()) return;
    if (found) show(found.text, found.at);
    else {
      last = texts().find((text) => text.closest(".response") === event.target.closest(".response")) ?? last;
      rest();
    }
  });
  card.addEventListener("pointerleave", rest);
  card.addEventListener("click", (event) => {
    const found = tokenOf(event.target);
    if (!found) return;
    if (pin.text === found.text && pin.at === found.at) release();
    else setPin(found.text, found.at);
  });
  card.addEventListener("focusin", (event) => {
    if (event.target.matches(".text:focus-visible") && traces.get(event.target)?.attention && !isPinned()) setPin(event.target, 0);
  });
  card.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const text = event.target.closest(".text");
    if (!step || !text || event.altKey || event.ctrlKey || event.metaKey || !traces.get(text)?.attention) return;
    event.preventDefault();
    event.stopPropagation(); // the arrows turn pages elsewhere
    const shown = text.querySelectorAll(".token").length;
    const at = pin.text === text ? pin.at + step : 0;
    setPin(text, Math.min(shown - 1, Math.max(0, at)));
    text.querySelector(`.token[data-at="${pin.at}"]`).scrollIntoView({ block: "nearest" });
  });
  card.restLooking = rest;
  rest();
  return card;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("lightbox").open) pin.release?.();
});

// The switch of the toolbar: what is shown while nothing is pointed at.
function attentionSwitch() {
  const { numAttention, numAttentionLeftOut } = RUN.rollouts;
  if (!numAttention) return null;
  const left = numAttentionLeftOut ? `; that of ${plural(numAttentionLeftOut, "more response")} stayed in the folder rollouts/` : "";
  return h(
    "label",
    { title: `${plural(numAttention, "response")} on this page come with where their tokens looked${left}` },
    h("input", {
      type: "checkbox",
      id: "choose-attention",
      onchange: (event) => {
        browser.settings.attention = event.target.checked ? "mean" : "";
        for (const card of document.querySelectorAll("#groups .attributed")) card.restLooking();
        rememberSettings();
      },
    }),
    " Mean attention",
  );
}
