// How tokens are shaded by a per-token quantity, its legend, and the values under the pointer.

import { byId, h, parts } from "./dom.js";
import { figure } from "./format.js";
import { QUANTITIES, browser, quantities, traces } from "./rollout_store.js";
import { RUN } from "./run_data.js";
import { ramp, shadeOf } from "./scales.js";

/** @import { PageEvent, Part, Quantity } from "./types" */

/** @param {Part} element */
export function shadeText(element) {
  const name = browser.settings.shade;
  const values = name && traces.get(element)?.[name];
  for (const node of parts(element, ".token"))
    node.style.backgroundColor = values ? shade(values[Number(node.dataset.at)], name) : "";
}

/**
 * @param {number | null} value
 * @param {Quantity} name
 */
function shade(value, name) {
  return shadeOf(value, RUN.rollouts.scales[name], QUANTITIES[name].reversed);
}

export function drawLegend() {
  byId("legend").replaceChildren(legend(browser.settings.shade) || "");
}

/** @param {Quantity | ""} name */
export function legend(name) {
  const scale = name && RUN.rollouts.scales[name];
  if (!scale) return null;
  const { low, high, reversed } = QUANTITIES[name];
  const bar = h("i", { class: "ramp" });
  bar.style.backgroundImage = ramp(scale, reversed);
  const end = (/** @type {number} */ value, /** @type {string} */ word) => [
    h("b", {}, figure(value, scale.kind === "signed")),
    value !== 0 && ` ${word}`,
  ];
  return h(
    "div",
    { class: "legend" },
    h("span", {}, end(scale.low, low)),
    bar,
    h("span", {}, end(scale.high, high)),
  );
}

/** @param {PageEvent} event */
export function showTooltip(event) {
  const tip = byId("tooltip");
  const node = event.target.closest(".token");
  tip.hidden = !node;
  if (!node) return;
  const trace = traces.get(event.currentTarget);
  if (!trace) return;
  const at = Number(node.dataset.at);
  const rows = quantities()
    .filter((name) => name in trace)
    .map((name) =>
      h(
        "tr",
        { class: name === browser.settings.shade ? "chosen" : "" },
        h("td", {}, QUANTITIES[name].label),
        h(
          "td",
          { "data-quantity": name },
          figure(trace[name]?.[at], RUN.rollouts.scales[name]?.kind === "signed"),
        ),
      ),
    );
  tip.replaceChildren(
    h(
      "p",
      {},
      h("code", {}, JSON.stringify(trace.tokens[at])),
      h("span", {}, ` token ${at + 1} of ${trace.tokens.length}`),
    ),
    h("table", {}, h("tbody", {}, rows)),
  );
  const box = node.getClientRects()[0];
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left + scrollX}px`;
  // Above it would cover the picture, where the heat map is.
  const covers = trace.attention && box.bottom + tip.offsetHeight + 6 < innerHeight;
  tip.style.top = `${(above > 0 && !covers ? above : box.bottom + 6) + scrollY}px`;
}
