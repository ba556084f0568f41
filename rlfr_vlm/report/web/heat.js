// How strongly a token looked at each cell of a picture, and as what colour that is shown.

/** @import { AttentionData } from "./data" */

/** @type {[number, number[]][]} */
const HEAT = [
  // strength -> red, green, blue, opacity: visible on dark and on light pictures, which stay
  // visible under it
  [0, [92, 60, 210, 0]],
  [0.2, [110, 50, 215, 0.22]],
  [0.6, [222, 0, 122, 0.5]],
  [1, [255, 92, 0, 0.68]],
];

/** @param {number} strength */
export function heat(strength) {
  const after = Math.max(
    1,
    HEAT.findIndex(([at]) => at >= strength),
  );
  const [[low, from], [high, to]] = [HEAT[after - 1], HEAT[after]];
  const part = (strength - low) / (high - low);
  return from.map((value, number) => value + part * (to[number] - value));
}

export function heatRamp() {
  const stops = HEAT.map(([at, [r, g, b, part]]) => `rgb(${r} ${g} ${b} / ${part}) ${100 * at}%`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/**
 * Strengths from 0 to 1 of one token, or of the mean over tokens, each cell of which is a share of
 * all their attention.
 * @param {Uint8Array} cells
 * @param {AttentionData} attention
 * @param {number | null} at
 * @returns {number[]}
 */
export function strengths(cells, { share }, at) {
  const size = cells.length / share.length;
  if (at !== null)
    return Array.from(cells.subarray(at * size, (at + 1) * size), (value) => value / 255);
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
