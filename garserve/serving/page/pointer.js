// Mouse, pen and finger on the drawing area; the keyboard's pen goes the same way (keyboard.js).
import { begin, drawn, extend, finished } from "./gestures.js";
import { contains, corners, joined, moved, regionAt, resized } from "./regions.js";

const LEAST = 5; // pixels of the screen that a drawn shape spans at least: less is a click
const REACH = { mouse: 9, pen: 12, touch: 22 }; // how near a handle counts as on it

export class Pointer {
  constructor(stage, store, editing) {
    Object.assign(this, { stage, store, editing });
    this.active = null;
    const { canvas } = stage;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", () => this.cancel());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  get state() { return this.store.state; }

  down(event) {
    if (!this.state.picture || event.button > 0) return;
    if (!event.isPrimary) return this.cancel(); // a second finger enlarges the page; it draws nothing
    this.stage.canvas.setPointerCapture(event.pointerId);
    this.start(this.stage.toPicture(event), REACH[event.pointerType] ?? 9, event.shiftKey || this.state.joining);
  }

  move(event) {
    if (!this.state.picture || !event.isPrimary) return;
    if (!this.active) return this.hover(event);
    const way = event.getCoalescedEvents?.() ?? [];
    for (const one of way.length ? way : [event]) this.go(this.stage.toPicture(one));
  }

  up(event) {
    if (event.isPrimary) this.end();
  }

  hover(event) {
    const grip = this.gripAt(this.stage.toPicture(event), REACH[event.pointerType] ?? 9);
    const free = this.state.tool === "move" ? "default" : "crosshair";
    const held = grip?.corner === undefined ? "move" : ["nwse-resize", "nesw-resize"][grip.corner % 2];
    this.stage.canvas.style.cursor = grip ? held : free;
  }

  wheel(event) {
    if (!this.state.picture) return;
    if (event.ctrlKey || event.metaKey) this.stage.enlarge(Math.exp(-event.deltaY / 200), this.stage.toPicture(event));
    else if (this.stage.zoom.factor > 1) this.stage.pan(event.deltaX, event.deltaY);
    else return;
    event.preventDefault();
  }

  /** What a press would take hold of: a corner of the selected box, or with the move tool a region. */
  gripAt(point, reach) {
    const { regions, selected, tool } = this.state, { scale } = this.stage.view();
    const chosen = regions[selected];
    const near = chosen ? corners(chosen).findIndex(([x, y]) => Math.hypot(x - point[0], y - point[1]) * scale <= reach) : -1;
    if (near >= 0) return { position: selected, corner: near };
    if (tool !== "move") return null;
    const on = chosen && contains(chosen, point, reach / scale) ? selected : regionAt(regions, point, reach / scale);
    return on >= 0 ? { position: on } : null;
  }

  /** The selected region, where the point tool can give it one more point. */
  get joinable() {
    const { regions, selected, tool } = this.state, region = regions[selected];
    return tool === "point" && region?.shape.points ? region : null;
  }

  /** Begin at a point; `joining` is one more point of the selected region, set where `end` finds it. */
  start(point, reach, joining = false) {
    const { regions, tool, brush, picture, selected } = this.state;
    const grip = this.gripAt(point, reach);
    if (grip) {
      this.store.set({ selected: grip.position });
      this.active = { ...grip, from: point, region: regions[grip.position], result: null };
    } else if (tool === "move") this.store.set({ selected: -1 });
    else if (joining && this.joinable) {
      const region = this.joinable;
      this.active = { position: selected, region, joining, result: joined(region, point, picture) };
    } else this.active = { gesture: begin(tool, point, brush, picture), from: point };
    this.preview();
  }

  go(point) {
    const { active } = this, { picture } = this.state;
    if (!active) return;
    if (active.gesture) extend(active.gesture, point);
    else if (active.corner !== undefined) active.result = resized(active.region, active.corner, point, picture);
    else if (active.joining) active.result = joined(active.region, point, picture);
    else active.result = moved(active.region, point[0] - active.from[0], point[1] - active.from[1], picture);
    this.preview();
  }

  end() {
    const { active } = this;
    this.cancel();
    if (!active) return;
    if (!active.gesture) {
      const there = this.state.regions[active.position] === active.region; // keys may have changed it meanwhile
      if (active.result && there) this.editing.replace(active.position, active.result);
      return;
    }
    const { scale } = this.stage.view();
    const region = finished(active.gesture, LEAST / scale);
    if (region) this.editing.add(region);
    else this.store.set({ selected: regionAt(this.state.regions, active.from, LEAST / scale) });
  }

  cancel() {
    this.active = null;
    this.stage.show({ draft: null, regions: this.state.regions });
  }

  preview() {
    const { active } = this;
    if (!active) return;
    if (active.gesture) return this.stage.show({ draft: drawn(active.gesture) });
    if (!active.result) return;
    this.stage.show({ regions: this.state.regions.map((region, i) => (i === active.position ? active.result : region)) });
  }
}
