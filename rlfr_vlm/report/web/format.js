// Figures and words as the page shows them.

// Characters that show as nothing, or that turn round the text after them.
export const HIDDEN_CHARACTERS =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;

/**
 * A hidden character by its code point.
 * @param {string} letter
 */
export function codePoint(letter) {
  return `U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/**
 * Text for places that take no elements: hidden characters as their code points.
 * @param {string} text
 */
export function plainText(text) {
  const hidden = new RegExp(HIDDEN_CHARACTERS.source, "g");
  return text.replace(hidden, (letter) => (/\s/.test(letter) ? " " : codePoint(letter)));
}

/** @returns {value is number} */
export const isNumber = (/** @type {unknown} */ value) => typeof value === "number";

export const count = (/** @type {number} */ value) => value.toLocaleString("en-US");

/**
 * @param {number} value
 * @param {string} noun
 */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/**
 * A share, with more digits where it is small.
 * @param {number | null | undefined} value
 */
export function percent(value) {
  if (!isNumber(value)) return "–";
  const points = Math.round(1e11 * value) / 1e9; // what is left behind that, sums leave
  const small = points !== 0 && Math.abs(points) < 1;
  let text = small ? points.toPrecision(2) : points.toFixed(1);
  for (let digits = 2; Math.abs(Number(text)) === 100 && Math.abs(points) !== 100; digits += 1) {
    text = points.toFixed(digits);
  }
  return `${text} %`;
}

/**
 * Four significant digits with a real minus sign; `signed` puts a plus before positive values.
 * @param {number | null | undefined} value
 * @param {boolean} signed
 */
export function figure(value, signed = false) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  const text =
    size !== 0 && (size < 1e-3 || size >= 1e6)
      ? size.toExponential(2)
      : String(Number(size.toPrecision(4)));
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}

/** @param {number} value */
export function points(value) {
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(1)}`;
}

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.05) return "< 0.1 s";
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** @param {(number | null | undefined)[]} values */
export function median(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

/** @param {{ low: number | null, high: number | null }} interval */
export const bounds = ({ low, high }) =>
  `${(100 * (low ?? NaN)).toFixed(1)} – ${(100 * (high ?? NaN)).toFixed(1)}`;

export const sum = (/** @type {number[]} */ values) =>
  values.reduce((total, value) => total + value, 0);
