// What several pages say in the same way: what is missing, questions, pictures.

import { byId, h, part } from "./dom.js";
import { plural } from "./format.js";

/** @import { PictureData, FileNote } from "./data" */
/** @import { Child, PageEvent } from "./types" */

/**
 * What a reader should know about the files.
 * @param {{ problems: FileNote[], numMoreProblems: number }} run
 * @param {string} missingTitle
 */
export function problemPanel(run, missingTitle) {
  const lines = (/** @type {FileNote["kind"]} */ kind) =>
    run.problems.filter((problem) => problem.kind === kind);
  if (!run.problems.length) return null;
  const missing = lines("missing");
  return h(
    "div",
    { class: `notice ${lines("damaged").length ? "damaged" : ""}`, id: "problems" },
    lines("damaged").map((problem) =>
      h("p", {}, h("b", {}, "Damaged: "), h("code", {}, problem.file), `: ${problem.text}.`),
    ),
    lines("note").map((problem) =>
      h("p", {}, h("b", {}, "Note: "), h("code", {}, problem.file), `: ${problem.text}.`),
    ),
    missing.length > 0 && missingFiles(missing, missingTitle),
    run.numMoreProblems > 0 && h("p", {}, `… and ${plural(run.numMoreProblems, "more line")}.`),
  );
}

/**
 * Files that are not there, those with something to say each on a line.
 * @param {FileNote[]} missing
 * @param {string} title
 */
function missingFiles(missing, title) {
  const plain = missing.filter(({ text }) => text === "not there");
  const telling = missing.filter(({ text }) => text !== "not there");
  const names = plain.map(({ file }, at) => [at ? ", " : "", h("code", {}, file)]);
  return [
    plain.length > 0 && h("p", {}, h("b", {}, title), names, "."),
    telling.length > 0 && [
      h("p", {}, h("b", {}, title.replace(/: $/, ":"))),
      h(
        "ul",
        {},
        telling.map(({ file, text }) => h("li", {}, h("code", {}, file), `: ${text}.`)),
      ),
    ],
  ];
}

/**
 * The question with a sign for every picture in it; none for a single one before the text.
 * @param {{ question: string, images: PictureData[] }} problem
 * @returns {Child[]}
 */
export function questionText({ question, images }) {
  const pieces = (images.length > 1 ? question : question.replace(/^<image>\s*/, "")).split(
    "<image>",
  );
  return pieces.map((piece, at) => [
    at > 0 && h("span", { class: "tag" }, images.length > 1 ? `picture ${at}` : "picture"),
    piece,
  ]);
}

/** @param {PictureData} image */
export function picture({ key, path, file }) {
  if (!key)
    return h(
      "p",
      { class: "no-picture" },
      file ? ["not on this page ", fileLink(file)] : ["picture not found", h("code", {}, path)],
    );
  const image = h("img", {
    src: byId(`picture-${key}`).textContent,
    alt: "picture of the question",
    title: "click to enlarge",
    onclick: enlarge,
    onload: fit,
  });
  return image;
}

/**
 * A file beside this page, by its relative path.
 * @param {string} path
 */
export function fileLink(path) {
  const parts = path.split("/");
  if (parts.includes("..") || parts[0] === "") return h("code", {}, path);
  return h("a", { href: `./${parts.map(encodeURIComponent).join("/")}` }, h("code", {}, path));
}

/**
 * Small pictures are enlarged by a whole factor, so that their pixels stay square.
 * @param {PageEvent} event
 */
function fit(event) {
  const image = event.target;
  const times = Math.floor(200 / Math.max(image.naturalWidth, image.naturalHeight));
  if (times < 2) return;
  image.style.width = `${times * image.naturalWidth}px`;
  image.classList.add("pixels");
}

/** @param {PageEvent} event */
function enlarge(event) {
  const image = part(byId("lightbox"), "img");
  image.src = event.target.src;
  image.classList.toggle("pixels", event.target.classList.contains("pixels"));
  byId("lightbox").showModal();
}
