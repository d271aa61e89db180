// What the page knows, in one object; whoever shows a part of it is told when it changes.

export class Store {
  constructor(state) {
    this.state = state;
    this.listeners = [];
  }

  /** Change some fields; listeners get the state and the set of changed names. */
  set(patch) {
    const changed = new Set(Object.keys(patch).filter((name) => patch[name] !== this.state[name]));
    if (!changed.size) return;
    this.state = { ...this.state, ...patch };
    for (const listener of this.listeners) listener(this.state, changed);
  }

  /** Call a listener at every change of one of these fields, and once now. */
  on(names, listener) {
    this.listeners.push((state, changed) => { if (names.some((name) => changed.has(name))) listener(state, changed); });
    listener(this.state, new Set(names));
  }
}
