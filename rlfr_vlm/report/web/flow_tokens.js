// The figures in the tables of tokens.

/** @import { TokenWindow } from "./data" */

/**
 * The power of ten of means, so that the columns hold two decimals.
 * @param {TokenWindow[]} windows
 */
export function unitOf(windows) {
  const means = windows.flatMap(({ rewarded, penalised }) =>
    [...rewarded, ...penalised].map(({ reward, count }) => Math.abs(reward / count)),
  );
  return 10 ** Math.floor(Math.log10(Math.max(...means.filter(Number.isFinite), 1e-12)));
}

/**
 * @param {number} value
 * @param {number} unit
 */
export function inUnits(value, unit) {
  if (!Number.isFinite(value)) return "–";
  const text = Math.abs(value / unit).toFixed(2);
  return `${value < 0 ? "−" : "+"}${text}`;
}
