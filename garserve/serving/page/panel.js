// The list of regions beside the picture, and the tools above it.
import { $, badge, iconButton, make } from "./elements.js";
import { nameOf } from "./names.js";
import { bounds, kindOf } from "./regions.js";

const words = (className, textContent) => make("span", { className, textContent });

export class Panel {
  constructor(store, { editing, talk, light, stage }) {
    Object.assign(this, { store, editing, talk, light });
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => { store.set({ tool: button.dataset.tool }); });
    }
    $("undo").addEventListener("click", () => editing.undo());
    $("redo").addEventListener("click", () => editing.redo());
    $("auto").addEventListener("click", () => store.set({ auto: !store.state.auto }));
    $("brush").addEventListener("input", ({ target }) => store.set({ brush: Number(target.value) }));
    $("closer").addEventListener("click", () => stage.enlarge(1.5));
    $("farther").addEventListener("click", () => stage.enlarge(1 / 1.5));
    $("describe").addEventListener("click", () => this.describe());
    store.on(["selected", "tool"], (_, changed) => { if (!changed.has("joining")) store.set({ joining: false }); });
    store.on(["regions", "selected", "refining", "picture", "joining"], (state) => this.list(state));
    store.on(["tool", "auto", "picture", "brush"], (state) => this.tools(state));
    store.on(["regions", "picture", "busy", "steps"], (state) => this.buttons(state));
  }

  describe() {
    const { regions, picture, busy } = this.store.state;
    if (picture && regions.length && !busy) this.talk.describe();
  }

  list({ regions, selected, refining, picture, joining }) {
    const at = [...$("regions").querySelectorAll("button")].indexOf(document.activeElement);
    $("regions").replaceChildren(...regions.map((region, i) => this.item(region, i, { selected, refining, joining })));
    const buttons = $("regions").querySelectorAll("button"); // whoever stood on one of them stands on its successor
    if (at >= 0) (buttons[Math.min(at, buttons.length - 1)] ?? $("canvas")).focus();
    $("no-regions").hidden = regions.length > 0 || !picture;
    $("count").textContent = regions.length ? `${regions.length} of ${this.editing.most}` : "";
  }

  item(region, position, { selected, refining, joining }) {
    const [x1, y1, x2, y2] = bounds(region).map(Math.round);
    const choose = make("button", {
      type: "button", className: "choose", aria: { pressed: position === selected },
      onclick: () => this.store.set({ selected: position === this.store.state.selected ? -1 : position }),
    }, badge(position), words("kind", kindOf(region)), words("size", `${x2 - x1} × ${y2 - y1}`));
    const busy = refining === region;
    const name = nameOf(position);
    const refine = iconButton(busy ? "wait" : "refine", `Refine ${name} to the object's outline`, () => this.editing.refine(position));
    refine.disabled = Boolean(refining) || Boolean(region.rle);
    const gone = iconButton("delete", `Delete ${name}`, () => this.editing.remove(position));
    const more = region.shape.points ? [this.more(position, joining && position === selected)] : [];
    const item = make("li", { data: { region: position } }, choose, refine, ...more, gone);
    item.classList.toggle("chosen", position === selected);
    item.classList.toggle("busy", busy);
    item.onpointerenter = () => this.light(position);
    item.onpointerleave = () => this.light(-1);
    return item;
  }

  // Shift for those who have none: while it is pressed, the point tool gives the region further points.
  more(position, pressed) {
    const text = `More points of ${nameOf(position)}`;
    const button = iconButton("plus", text, () => {
      this.store.set({ tool: "point", selected: position, joining: !pressed });
      if (!pressed) this.editing.tell(`${text}: point at them on the picture.`);
    });
    button.setAttribute("aria-pressed", pressed);
    return button;
  }

  tools({ tool, auto, picture, brush }) {
    for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === tool);
    $("auto").setAttribute("aria-pressed", auto);
    $("brush-field").hidden = tool !== "scribble" && tool !== "point";
    if (picture) {
      const most = Math.max(Math.round(Math.max(picture.width, picture.height) / 6), 8);
      $("brush").max = most;
      $("brush").value = brush ?? most / 4;
    }
    document.body.dataset.state = picture ? "ready" : "empty";
    if (picture) $("canvas").parentElement.style.setProperty("--shape", picture.width / picture.height);
    const about = picture ? [picture.name, `${picture.width} × ${picture.height}`, picture.changed] : [];
    $("about-picture").textContent = about.filter(Boolean).join(" · ");
  }

  buttons({ regions, picture, busy }) {
    $("undo").disabled = !this.editing.history.past.length;
    $("redo").disabled = !this.editing.history.future.length;
    $("describe").disabled = busy || !picture || !regions.length;
    $("describe-label").textContent = regions.length > 1 ? `Describe all ${regions.length}` : "Describe";
    $("code").disabled = !picture || !regions.length;
  }
}
