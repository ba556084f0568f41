// How tokens are shaded by a per-token quantity, its legend, and the values under the pointer.

const STRONGEST = 0.75; // opacity of the shading at the ends of the scale
const QUANTITIES = {
  flow_rewards: { label: "flow reward", low: "penalised", high: "rewarded" },
  deviations: { label: "deviation", low: "near the flow", high: "far" },
  logprobs: { label: "log-prob", low: "unlikely", high: "likely", reversed: true },
  advantages: { label: "advantage", low: "discouraged", high: "encouraged" },
  entropy: { label: "entropy", low: "certain", high: "open" },
};
const DEFAULT_SHADE = Object.keys(QUANTITIES).find((name) => name in RUN.rollouts.scales) || "";

// Where a value lies on its scale: a colour, and how strong.
function shadeOf(value, name) {
  const scale = RUN.rollouts.scales[name];
  if (!isNumber(value) || !scale) return "";
  const span = scale.high - scale.low || 1;
  let [hue, strength] = ["--magnitude", (value - scale.low) / span];
  if (QUANTITIES[name].reversed) strength = 1 - strength;
  if (scale.kind !== "magnitude")
    [hue, strength] = [value < 0 ? "--penalty" : "--bonus", Math.abs(value) / (Math.max(-scale.low, scale.high) || 1)];
  strength = Math.min(1, Math.max(0, strength));
  return strength < 0.01 ? "" : `rgb(var(${hue}) / ${(STRONGEST * strength).toFixed(3)})`;
}

function shadeText(element) {
  const name = browser.settings.shade;
  const values = traces.get(element)?.[name];
  for (const node of element.querySelectorAll(".token")) node.style.backgroundColor = values ? shadeOf(values[node.dataset.at], name) : "";
}

function reshade() {
  for (const element of document.querySelectorAll("#groups .text")) shadeText(element);
  drawLegend();
  rememberSettings();
}

function drawLegend() {
  byId("legend").replaceChildren(legend(browser.settings.shade) || "");
}

function legend(name) {
  const scale = RUN.rollouts.scales[name];
  if (!scale) return null;
  const { low, high } = QUANTITIES[name];
  const bar = h("i", { class: "ramp" });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((part) => shadeOf(scale.low + part * (scale.high - scale.low), name) || "transparent");
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const end = (value, word) => [h("b", {}, figure(value, scale.kind === "signed")), value !== 0 && ` ${word}`];
  return h("div", { class: "legend" }, h("span", {}, end(scale.low, low)), bar, h("span", {}, end(scale.high, high)));
}

function showTooltip(event) {
  const tip = byId("tooltip");
  const node = event.target.closest(".token");
  tip.hidden = !node;
  if (!node) return;
  const trace = traces.get(event.currentTarget);
  const at = Number(node.dataset.at);
  const rows = Object.entries(QUANTITIES)
    .filter(([name]) => name in trace)
    .map(([name, { label }]) =>
      h(
        "tr",
        { class: name === browser.settings.shade ? "chosen" : "" },
        h("td", {}, label),
        h("td", { "data-quantity": name }, figure(trace[name][at], RUN.rollouts.scales[name]?.kind === "signed")),
      ),
    );
  tip.replaceChildren(
    h("p", {}, h("code", {}, JSON.stringify(trace.tokens[at])), h("span", {}, ` token ${at + 1} of ${trace.tokens.length}`)),
    h("table", {}, h("tbody", {}, rows)),
  );
  const box = node.getClientRects()[0];
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left + scrollX}px`;
  const covers = trace.attention && box.bottom + tip.offsetHeight + 6 < innerHeight; // the picture, where the heat map is
  tip.style.top = `${(above > 0 && !covers ? above : box.bottom + 6) + scrollY}px`;
}
