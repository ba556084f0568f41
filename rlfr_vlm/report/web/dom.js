// Elements. Text from the files reaches a page only as text nodes and attributes that `h` sets.

import { HIDDEN_CHARACTERS, codePoint } from "./format.js";

/** @import { Attributes, Child, Part } from "./types" */

/**
 * An element with attributes, listeners (`onclick` and the like) and children.
 * @param {string} tag
 * @param {Attributes} attributes
 * @param {Child[]} children
 * @returns {Part}
 */
export function h(tag, attributes = {}, ...children) {
  const node = /** @type {Part} */ (document.createElement(tag));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function")
      node.addEventListener(name.slice(2), /** @type {(event: any) => unknown} */ (value));
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  const flat = /** @type {Exclude<Child, Child[]>[]} */ (
    /** @type {unknown[]} */ (children).flat(Infinity)
  );
  for (const child of flat) {
    if (child === null || child === undefined || child === false) continue;
    node.append(typeof child === "object" ? child : visible(String(child)));
  }
  return node;
}

/**
 * Hidden characters show as their code points and can do nothing; `marked` puts signs before line
 * breaks and tabs.
 * @param {string} text
 * @param {boolean} marked
 * @returns {string | DocumentFragment}
 */
export function visible(text, marked = false) {
  if (!HIDDEN_CHARACTERS.test(text)) return text;
  const fragment = document.createDocumentFragment();
  for (const piece of text.split(new RegExp(`(${HIDDEN_CHARACTERS.source})`))) {
    if (piece === "\n") fragment.append(marked ? glyph("⏎") : "", "\n");
    else if (piece === "\t") fragment.append(marked ? glyph("⇥") : "", "\t");
    else if (piece.length === 1 && HIDDEN_CHARACTERS.test(piece))
      fragment.append(glyph(codePoint(piece)));
    else fragment.append(piece);
  }
  return fragment;
}

/** @param {string} text */
export function glyph(text) {
  return h("i", { class: "glyph" }, text);
}

/** @returns {Part} */
export const byId = (/** @type {string} */ id) => /** @type {Part} */ (document.getElementById(id));

/**
 * An element that must be there.
 * @param {ParentNode} parent
 * @param {string} selector
 */
export function part(parent, selector) {
  return /** @type {Part} */ (parent.querySelector(selector));
}

/**
 * @param {ParentNode} parent
 * @param {string} selector
 */
export function parts(parent, selector) {
  return /** @type {Part[]} */ ([...parent.querySelectorAll(selector)]);
}

export const css = (/** @type {string} */ name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();
