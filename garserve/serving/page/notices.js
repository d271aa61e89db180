// What the page has to say: errors in sight until they are closed, small news for a moment, and all of it to screen readers.
import { $, iconButton, make } from "./elements.js";

const MOMENT_MS = 2600;

/** Say something to screen readers, and with `seen` to everybody, for a moment. */
export function tell(text, seen = false) {
  $("said").textContent = text;
  if (!seen) return;
  const notice = make("div", { className: "notice", textContent: text, aria: { hidden: "true" } });
  show(notice);
  setTimeout(() => notice.remove(), MOMENT_MS);
}

/** Show an error until it is closed; the same one is not shown twice. */
export function fail(error) {
  const text = typeof error === "string" ? error : error.message || String(error);
  for (const notice of $("notices").querySelectorAll(".error")) notice.remove();
  const notice = make("div", { className: "notice error", role: "alert" }, make("span", { textContent: text }));
  notice.append(iconButton("close", "Close", () => notice.remove()));
  show(notice);
}

// Above everything, an open dialog too: what came last to the top layer is the highest in it.
function show(notice) {
  const box = $("notices");
  box.append(notice);
  if (box.matches(":popover-open")) box.hidePopover();
  box.showPopover?.();
}

/** Take errors away: what was wrong is right now. */
export function calm() {
  for (const notice of $("notices").querySelectorAll(".error")) notice.remove();
}
