// Everything that changes the regions: each step can be undone, and is told to those who cannot see it.
import * as api from "./api.js";
import { History } from "./history.js";
import { COLOURS, nameOf } from "./names.js";
import { bounds, kindOf, moved } from "./regions.js";

export class Editing {
  /** `tell` says a sentence to screen readers, `fail` shows an error, `renamed` hears of a deleted position. */
  constructor(store, { tell, fail, renamed }) {
    Object.assign(this, { store, tell, fail, renamed });
    this.history = new History();
  }

  get state() { return this.store.state; }

  /** How many regions the model and the colours allow. */
  get most() { return Math.min(this.state.prompts ?? COLOURS.length, COLOURS.length); }

  /** A new picture, with regions or without. */
  open(picture, regions = []) {
    this.history.clear();
    this.store.set({ picture, regions: regions.slice(0, this.most), selected: -1, steps: {} });
    this.tell(`${picture.name}, ${picture.width} by ${picture.height} pixels.`);
  }

  commit(regions, selected, what) {
    this.history.push(this.state.regions, what);
    this.store.set({ regions, selected, steps: {} });
  }

  /** Add a region; false where there are as many as the model takes. */
  add(region) {
    const { regions, auto } = this.state;
    if (!this.hasRoom()) return false;
    this.commit([...regions, region], regions.length);
    this.tell(`Region ${regions.length} added: ${described(region)}.`);
    if (auto && (region.shape.box || region.shape.points)) this.refine(regions.length);
    return true;
  }

  hasRoom() {
    if (this.state.regions.length < this.most) return true;
    this.fail(`This model takes ${this.most} regions at once. Delete one first.`);
    return false;
  }

  /** Put another region in a position; changes of one name in quick succession are one step. */
  replace(position, region, what) {
    this.commit(this.state.regions.map((old, i) => (i === position ? region : old)), position, what && `${what} ${position}`);
  }

  /** Move the selected region by pixels of the picture. */
  nudge(dx, dy) {
    const { regions, selected, picture } = this.state;
    const region = moved(regions[selected], dx, dy, picture);
    this.replace(selected, region, "nudge");
    this.tell(`${nameOf(selected)}: ${described(region)}.`);
  }

  /** Let the right and lower edge of a selected box grow, or a brush's radius or width. */
  grow(dx, dy) {
    const { regions, selected, picture } = this.state, { shape } = regions[selected];
    if (shape.box) {
      const [x1, y1, x2, y2] = shape.box;
      const box = [x1, y1, Math.min(Math.max(x2 + dx, x1 + 1), picture.width), Math.min(Math.max(y2 + dy, y1 + 1), picture.height)];
      this.replace(selected, { shape: { box } }, "grow");
    } else if (shape.polygon) return;
    else {
      const field = shape.points ? "radius" : "width", by = (dx - dy) || 0;
      this.replace(selected, { shape: { ...shape, [field]: Math.max(shape[field] + by, 1) } }, "grow");
    }
    this.tell(`${nameOf(selected)}: ${described(this.state.regions[selected])}.`);
  }

  remove(position) {
    const { regions } = this.state;
    if (!regions[position]) return;
    this.commit(regions.filter((_, i) => i !== position), Math.min(position, regions.length - 2));
    this.renamed(position);
    this.tell(`Region ${position} deleted; ${regions.length - 1} left.`);
  }

  undo() { this.step("undo"); }

  redo() { this.step("redo"); }

  step(way) {
    const regions = this.history[way](this.state.regions);
    if (!regions) return this.tell(`Nothing to ${way}.`);
    this.store.set({ regions, selected: Math.min(this.state.selected, regions.length - 1), steps: {} });
    return this.tell(`${way === "undo" ? "Undone" : "Redone"}; ${regions.length} regions.`);
  }

  /** Ask the server for the object's own outline within a region. */
  async refine(position) {
    const { regions, picture } = this.state, region = regions[position];
    if (!region || this.state.refining) return;
    this.store.set({ refining: region });
    try {
      const rle = await api.refine(picture.url, region.shape);
      const now = this.state.regions.indexOf(region);
      if (now >= 0 && this.state.picture === picture) {
        this.replace(now, { shape: region.shape, rle });
        this.tell(`Region ${now} refined to the object's outline.`);
      }
    } catch (error) {
      this.fail(error);
    } finally {
      this.store.set({ refining: null });
    }
  }
}

// A region in words.
function described(region) {
  const [x1, y1, x2, y2] = bounds(region).map(Math.round);
  return `${kindOf(region)}, ${x2 - x1} by ${y2 - y1} pixels, at ${x1}, ${y1}`;
}
