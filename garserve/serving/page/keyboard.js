// Everything without a mouse: shortcuts, and a pen that arrow keys lead over the picture.
import { nameOf } from "./names.js";
import { clamp } from "./regions.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOOLS = { v: "move", b: "box", l: "lasso", s: "scribble", p: "point" };

export class Keyboard {
  constructor({ stage, store, editing, pointer, ask, help, tell }) {
    Object.assign(this, { stage, store, editing, pointer, ask, help, tell });
    document.addEventListener("keydown", (event) => this.pressed(event));
    stage.canvas.addEventListener("blur", () => this.lift());
  }

  get state() { return this.store.state; }

  pressed(event) {
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest?.("input:not([type=range], [type=checkbox]), textarea, select");
    if (typing) return;
    const onCanvas = event.target === this.stage.canvas;
    if ((event.ctrlKey || event.metaKey ? this.command(event) : this.plain(event)) || (onCanvas && this.draw(event))) event.preventDefault();
  }

  command(event) {
    const letter = event.key.toLowerCase();
    if (letter === "z") event.shiftKey ? this.editing.redo() : this.editing.undo();
    else if (letter === "y") this.editing.redo();
    else if (event.key in ARROWS && event.target === this.stage.canvas) return this.grow(event);
    else return false;
    return true;
  }

  plain(event) {
    const letter = event.key.toLowerCase(), { regions, selected, picture } = this.state;
    if (event.altKey) return event.key in ARROWS && event.target === this.stage.canvas && this.grow(event);
    if (letter === "?") this.help();
    else if (!picture) return false;
    else if (TOOLS[letter]) this.take(TOOLS[letter]);
    else if (/^\d$/.test(letter) && regions[Number(letter)]) this.store.set({ selected: Number(letter) });
    else if ((event.key === "Delete" || event.key === "Backspace") && selected >= 0) this.editing.remove(selected);
    else if (letter === "r" && selected >= 0) this.editing.refine(selected);
    else if (letter === "d") this.ask.describe();
    else if (letter === "q") this.ask.focus();
    else if (event.key === "+" || event.key === "=") this.enlarge(1.5);
    else if (event.key === "-") this.enlarge(1 / 1.5);
    else if (event.key === "Escape") this.escape();
    else return false;
    return true;
  }

  take(tool) {
    this.store.set({ tool });
    this.tell(`${tool} tool`);
  }

  // About the pen, where there is one: what it is led over stays in sight.
  enlarge(by) {
    const { pen } = this.stage.scene;
    this.stage.enlarge(by, pen ?? undefined);
    if (pen) this.stage.reveal(pen);
  }

  escape() {
    this.pointer.cancel();
    this.lift();
    this.store.set({ selected: -1 });
  }

  grow(event) {
    if (this.state.selected < 0) return false;
    const [dx, dy] = ARROWS[event.key], step = event.shiftKey ? 10 : 1;
    this.editing.grow(dx * step, dy * step);
    return true;
  }

  // With a region selected the arrows move it; otherwise they lead the pen, which space or enter puts down and lifts.
  draw(event) {
    const { picture, selected, tool } = this.state;
    if (!picture) return false;
    const step = (event.shiftKey ? 10 : 1) * Math.max(1, Math.round(1 / this.stage.view().scale));
    if (event.key in ARROWS) {
      const [dx, dy] = ARROWS[event.key].map((way) => way * step);
      if (selected >= 0 && !this.pointer.active) this.editing.nudge(dx, dy);
      else this.lead(dx, dy);
    } else if ((event.key === " " || event.key === "Enter") && tool !== "move") this.press(event.shiftKey);
    else return false;
    return true;
  }

  lead(dx, dy) {
    const { picture } = this.state, [x, y] = this.stage.scene.pen ?? [picture.width / 2, picture.height / 2];
    const pen = [clamp(Math.round(x) + dx, 0, picture.width), clamp(Math.round(y) + dy, 0, picture.height)];
    this.stage.show({ pen });
    this.stage.reveal(pen);
    this.pointer.go(pen);
    this.tell(`Pen at ${pen[0]}, ${pen[1]}${this.pointer.active ? ", drawing" : ""}`);
  }

  press(joining) {
    if (this.pointer.active) this.finish();
    else if ((joining || this.state.joining) && this.pointer.joinable) this.join();
    else this.begin();
  }

  begin() {
    const { picture } = this.state;
    const pen = this.stage.scene.pen ?? [Math.round(picture.width / 2), Math.round(picture.height / 2)];
    this.store.set({ selected: -1 });
    this.stage.show({ pen });
    this.stage.reveal(pen);
    this.pointer.start(pen, 0);
    if (this.state.tool === "point") this.finish();
    else this.tell("Pen down: arrow keys draw, space ends the shape.");
  }

  // One more point of the selected region: its pen stays down to be led there, as arrow keys would move the region.
  join() {
    const { points } = this.pointer.joinable.shape, pen = this.stage.scene.pen ?? points.at(-1);
    this.stage.show({ pen });
    this.stage.reveal(pen);
    this.pointer.start(pen, 0, true);
    this.tell(`One more point of ${nameOf(this.state.selected)}: arrow keys lead it, space sets it.`);
  }

  finish() {
    const { joining, position } = this.pointer.active;
    this.pointer.end();
    this.stage.show({ pen: null });
    const count = this.state.regions[position]?.shape.points?.length;
    if (joining && count) this.tell(`${nameOf(position)} has ${count} points.`);
  }

  lift() {
    if (!this.stage.scene.pen) return;
    this.pointer.cancel();
    this.stage.show({ pen: null });
  }
}
