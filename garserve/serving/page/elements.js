// Making elements.
import { nameOf, pieces } from "./names.js";

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; `data` goes to its dataset, `aria` to its aria attributes. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

// An icon of index.html.
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon that says what it does. */
export function iconButton(name, label, onclick) {
  return make("button", { type: "button", className: "quiet", title: label, aria: { label }, onclick }, icon(name));
}

/** A region's number in its colour. */
export function badge(position) {
  return make("span", { className: "badge", textContent: position, data: { region: position } });
}

/** A text whose region names are coloured. */
export function coloured(text) {
  return pieces(text).map((piece) =>
    typeof piece === "number" ? make("span", { className: "name", textContent: nameOf(piece), data: { region: piece } }) : piece);
}

/** Copy a text; false where the browser refuses. */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // only on https and localhost
    return true;
  } catch {
    const field = make("textarea", { value: text, className: "unseen" });
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
