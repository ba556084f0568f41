// On a page that is served: asks for the stamp of the newest page and loads that, without losing
// the view.
(() => {
  "use strict";
  const KEPT = `live ${location.pathname}`;
  const sign = document.createElement("span");
  sign.className = "pill";
  sign.id = "live";
  document.querySelector(".run")?.append(sign);

  /**
   * @param {string} text
   * @param {string} state
   */
  function say(text, state) {
    sign.textContent = text;
    sign.dataset.state = state;
  }

  const asInput = (/** @type {Element | null} */ node) => /** @type {HTMLInputElement} */ (node);
  const openDetails = () => [...document.querySelectorAll("details")].map((box) => box.open);
  /** @returns {HTMLInputElement[]} */
  const sliders = () => [...document.querySelectorAll("input[type=range][id]")].map(asInput);
  const REST = 2 * LOOK_MS; // after the reader did something
  let touched = -REST;
  for (const event of ["wheel", "touchmove", "keydown", "pointerdown", "input"])
    addEventListener(event, () => (touched = performance.now()), { passive: true });
  const busy = () =>
    document.hidden ||
    document.querySelector("dialog[open]") ||
    String(getSelection()) ||
    performance.now() - touched < REST;

  function keep() {
    const scrolled = [...document.querySelectorAll(".scroll")].map((box) => box.scrollTop);
    const slid = sliders().map(({ id, value }) => [id, value]);
    const kept = {
      hash: location.hash,
      x: scrollX,
      y: scrollY,
      details: openDetails(),
      scrolled,
      slid,
    };
    sessionStorage.setItem(KEPT, JSON.stringify(kept));
  }

  // Views draw over several frames: the place is taken again until the page is long enough, or the
  // reader moves.
  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
    sessionStorage.removeItem(KEPT);
    const view = (/** @type {string} */ hash) => hash.split("?")[0];
    if (!kept || view(kept.hash) !== view(location.hash)) return;
    for (const [id, value] of kept.slid) {
      const slider = asInput(document.getElementById(id));
      if (!slider || slider.value === value) continue;
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }
    const until = performance.now() + 3000;
    let moved = false;
    for (const event of ["wheel", "touchstart", "keydown", "mousedown"])
      addEventListener(event, () => (moved = true), { once: true });
    const again = () => {
      if (moved) return;
      const boxes = document.querySelectorAll("details");
      if (boxes.length === kept.details.length)
        boxes.forEach((box, at) => (box.open = kept.details[at]));
      const inner = document.querySelectorAll(".scroll");
      if (inner.length === kept.scrolled.length)
        inner.forEach((box, at) => (box.scrollTop = kept.scrolled[at]));
      scrollTo(kept.x, kept.y);
      if (Math.abs(scrollY - kept.y) > 1 && performance.now() < until) requestAnimationFrame(again);
    };
    again();
  }

  async function ask() {
    try {
      const answer = await fetch("/stamp", { cache: "no-store" });
      const newest = answer.ok ? await answer.text() : "";
      if (!newest) say("not live: no answer", "");
      else if (newest === PAGE_STAMP) say("live", "finished");
      else if (busy()) say("newer figures wait", "open");
      else {
        keep();
        location.reload();
        return;
      }
    } catch {
      say("not live: the server has ended", "");
    }
    setTimeout(ask, LOOK_MS);
  }

  history.scrollRestoration = "manual";
  addEventListener("DOMContentLoaded", restore);
  say("live", "finished");
  ask();
})();
