// Undo and redo of the regions.

const TOGETHER_MS = 800; // nudges of one region within this time are one step

export class History {
  constructor() { this.clear(); }

  clear() {
    this.past = [];
    this.future = [];
    this.last = { what: "", time: 0 };
  }

  /** Remember the regions as they were before a change; changes of one name in quick succession are one step. */
  push(regions, what = "") {
    const now = performance.now();
    const same = what && what === this.last.what && now - this.last.time < TOGETHER_MS;
    this.last = { what, time: now };
    if (!same) this.past.push(regions);
    this.future = [];
  }

  /** The regions one step back, or null. */
  undo(regions) { return this.step(this.past, this.future, regions); }

  /** The regions one step forward again, or null. */
  redo(regions) { return this.step(this.future, this.past, regions); }

  step(from, to, regions) {
    if (!from.length) return null;
    this.last = { what: "", time: 0 };
    to.push(regions);
    return from.pop();
  }
}
