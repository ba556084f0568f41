// Data that a page unpacks when they are asked for.

import { byId } from "./dom.js";

export const CAN_UNPACK = "DecompressionStream" in globalThis;

/**
 * What base64 of compressed bytes holds.
 * @param {string} text
 * @param {CompressionFormat} format
 */
export function inflated(text, format) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format)));
}

/**
 * The JSON of a block of the page.
 * @param {string} id
 * @returns {Promise<any>}
 */
export async function unpack(id) {
  return inflated(byId(id).textContent ?? "", "gzip").json();
}
