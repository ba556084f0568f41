// Where a value lies on its scale: a colour, and how strong.

import { isNumber } from "./format.js";

/** @import { ColourRange } from "./data" */

const STRONGEST = 0.75; // opacity of the shading at the ends of the scale

/**
 * @param {number | null | undefined} value
 * @param {ColourRange | undefined} scale
 * @param {boolean} reversed a low value is the strong one
 * @returns {string} a colour of CSS, "" for none
 */
export function shadeOf(value, scale, reversed = false) {
  if (!isNumber(value) || !scale) return "";
  const span = scale.high - scale.low || 1;
  let [hue, strength] = ["--magnitude", (value - scale.low) / span];
  if (reversed) strength = 1 - strength;
  if (scale.kind !== "magnitude")
    [hue, strength] = [
      value < 0 ? "--penalty" : "--bonus",
      Math.abs(value) / (Math.max(-scale.low, scale.high) || 1),
    ];
  strength = Math.min(1, Math.max(0, strength));
  return strength < 0.01 ? "" : `rgb(var(${hue}) / ${(STRONGEST * strength).toFixed(3)})`;
}

/**
 * Its colours from end to end.
 * @param {ColourRange} scale
 * @param {boolean} reversed
 */
export function ramp(scale, reversed = false) {
  const places = [0, 0.25, 0.5, 0.75, 1].map((part) => scale.low + part * (scale.high - scale.low));
  const stops = places.map((value) => shadeOf(value, scale, reversed) || "transparent");
  return `linear-gradient(to right, ${stops.join(", ")})`;
}
