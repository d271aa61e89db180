// The question field: region names put in by a click, coloured as they are on the picture.
import { $, coloured, make } from "./elements.js";
import { nameOf, named, without } from "./names.js";

// What a GAR model can be asked, by how many regions there are.
const IDEAS = {
  1: ["What colour is <Prompt0>?", "Where is <Prompt0>?", "How large is <Prompt0>?"],
  2: ["Where is <Prompt0> relative to <Prompt1>?", "Which is larger, <Prompt0> or <Prompt1>?", "Do <Prompt0> and <Prompt1> have the same colour?"],
};

export class Composer {
  constructor(store, { talk, fail }) {
    Object.assign(this, { store, talk, fail });
    this.field = $("question");
    this.field.addEventListener("input", () => this.colour());
    this.field.addEventListener("scroll", () => { $("question-colours").scrollTop = this.field.scrollTop; });
    this.field.addEventListener("keydown", (event) => this.key(event));
    $("send").addEventListener("click", () => (store.state.busy ? talk.stop() : this.send()));
    $("fresh").addEventListener("click", () => { talk.close(); this.field.focus(); });
    store.on(["regions", "picture"], (state) => { this.names(state); this.ideas(state); });
    store.on(["regions", "picture", "busy", "entries"], (state) => this.buttons(state));
    this.colour();
  }

  focus() { this.field.focus(); }

  names({ regions }) {
    $("names").hidden = !regions.length;
    $("names").replaceChildren("Insert", ...regions.map((_, i) => make("button", {
      type: "button", className: "badge", textContent: i, data: { region: i }, title: nameOf(i), aria: { label: `Put ${nameOf(i)} into the question` },
      onclick: () => this.insert(nameOf(i)),
    })));
  }

  ideas({ regions }) {
    const fitting = IDEAS[Math.min(regions.length, 2)] ?? [];
    const button = (text) => make("button", { type: "button", onclick: () => this.take(text) }, ...coloured(text));
    $("ideas").replaceChildren(...fitting.map(button));
  }

  buttons({ regions, picture, busy }) {
    const going = Boolean(this.talk.open()), ready = Boolean(picture && regions.length);
    $("send").disabled = !busy && !ready;
    $("send").dataset.busy = busy;
    $("send-label").textContent = busy ? "Stop" : going ? "Ask on" : "Ask";
    $("fresh").hidden = !going || busy;
    const hint = going ? "Ask on about the same regions …" : "Ask about the regions …";
    this.field.placeholder = ready ? hint : "Mark a region first, then ask about it …";
  }

  /** Put a name in at the caret, with spaces where they are missing. */
  insert(name) {
    const { field } = this, before = field.value.slice(0, field.selectionStart), after = field.value.slice(field.selectionEnd);
    const text = (before && !/\s$/.test(before) ? " " : "") + name + (after && !/^[\s?.,;:!]/.test(after) ? " " : "");
    this.write(text);
  }

  take(text) {
    this.field.focus();
    this.field.select();
    this.write(text);
  }

  // As if typed, so that the field's own undo knows of it.
  write(text) {
    this.field.focus();
    const { field } = this;
    if (!document.execCommand("insertText", false, text)) field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
    this.colour();
  }

  /** A region was deleted: later names move up. */
  renamed(gone) {
    this.field.value = without(this.field.value, gone);
    this.colour();
  }

  colour() {
    $("question-colours").replaceChildren(...coloured(this.field.value), "\u200b"); // keeps the last empty line high
  }

  key(event) {
    const { field } = this;
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this.store.state.busy) this.send();
    } else if (event.key === "Backspace" && field.selectionStart === field.selectionEnd) {
      const name = /<Prompt\d+>$/.exec(field.value.slice(0, field.selectionStart))?.[0];
      if (name) field.setSelectionRange(field.selectionStart - name.length, field.selectionStart); // a name goes as a whole
    } else if (event.key === "Escape") field.blur();
  }

  async send() {
    const question = this.field.value.trim(), { regions, picture } = this.store.state;
    if (!picture || !regions.length) return void this.fail("Mark at least one region of the picture first.");
    if (!question) return void this.field.focus();
    const missing = named(question).filter((position) => position >= regions.length);
    if (missing.length) {
      const marked = regions.map((_, i) => nameOf(i)).join(", ");
      return void this.fail(`${nameOf(missing[0])} is not marked on the picture; ${marked} ${regions.length > 1 ? "are" : "is"}.`);
    }
    this.field.value = "";
    this.colour();
    const { state, text } = await this.talk.ask(question);
    if (state !== "failed" || text || this.field.value) return;
    this.field.value = question; // to be asked again
    this.colour();
  }
}
