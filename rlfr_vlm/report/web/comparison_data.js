// What the page of a comparison is given at once, and the colours of its runs.

import { byId, h } from "./dom.js";
import { groupName } from "./groups.js";

/** @import { ComparisonData } from "./data" */
/** @import { SeedGroup } from "./types" */

/** @type {ComparisonData} */
export const DATA = JSON.parse(byId("comparison-data").textContent ?? "");
const HUES = [1, 2, 3, 4, 5, 6, 7, 8].map((number) => `--series-${number}`);
const DASHES = ["solid", "dash", "dot"]; // for more groups than hues

/**
 * A group is a run, or runs that differ in their seed alone; it has one colour everywhere.
 * @type {SeedGroup[]}
 */
export const GROUPS = DATA.groups.map((group, at) => ({
  ...group,
  at,
  name: groupName(group.runs.map((number) => DATA.runs[number].name)),
  hue: HUES[at % HUES.length],
  dash: DASHES[Math.floor(at / HUES.length) % DASHES.length],
  pooled: group.runs.length > 1,
}));

/** @param {SeedGroup} group */
export function swatch({ hue, dash }) {
  const line = h("i", { class: "swatch" });
  line.style.borderColor = `var(${hue})`;
  line.style.borderTopStyle = dash === "solid" ? "solid" : dash === "dash" ? "dashed" : "dotted";
  return line;
}
