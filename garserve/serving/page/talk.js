// What was asked and what came: entries of answers about a picture with its regions as they were then.
import * as api from "./api.js";
import { wire } from "./regions.js";

let count = 0;

/** An entry: {id, kind, picture, regions, answers}; kind is "describe" (an answer a region) or "chat" (one a turn). */
function entry(kind, picture, regions, answers) {
  return { id: ++count, kind, picture, regions, answers };
}

const answer = (question = null) => ({ question, text: "", state: "waiting", finish: null, error: null, first: null, took: null });

/** The messages of a conversation: the first one carries picture and regions, and `turns` are {question, text}. */
export function messages(url, regions, turns, question) {
  const seen = { type: "image_url", image_url: { url }, regions };
  const said = [...turns.flatMap(({ question: asked, text }) => [["user", asked], ["assistant", text]]), ["user", question]];
  return said.map(([role, text], i) => ({ role, content: i ? text : [seen, { type: "text", text }] }));
}

export class Talk {
  /** `changed` hears of an entry at every piece of text, `ended` once its answers are there. */
  constructor(store, { changed, ended, fail }) {
    Object.assign(this, { store, changed, ended, fail });
  }

  get state() { return this.store.state; }

  /** The conversation that another question would go on with: the last one, about the same regions. */
  open() {
    const last = this.state.entries.at(-1);
    const same = last?.kind === "chat" && last.picture === this.state.picture && !last.closed
      && JSON.stringify(last.regions.map(wire)) === JSON.stringify(this.state.regions.map(wire));
    return same ? last : null;
  }

  /** Describe every region. */
  async describe() {
    const { picture, regions, entries } = this.state;
    const made = entry("describe", picture, regions, regions.map(() => answer()));
    this.store.set({ entries: [...entries, made] });
    await this.run(made, made.answers, async (signal, began) => {
      const body = { image: picture.url, regions: regions.map(wire), ...this.longest() };
      for await (const event of api.describe(body, signal)) {
        const one = made.answers[event.index];
        if (!one || one.state === "done") continue;
        if (event.error) Object.assign(one, { state: "failed", error: event.error.message ?? String(event.error) });
        else if (event.text !== undefined) Object.assign(one, { text: event.text, finish: event.finish_reason, state: "done", took: since(began) });
        else grow(one, event.delta ?? "", began);
        this.changed(made);
      }
    });
  }

  /** Ask a question: the next turn of the open conversation, or the first of a new one. Resolves to its answer. */
  async ask(question) {
    const { picture, regions, entries, model } = this.state, going = this.open();
    const made = going ?? entry("chat", picture, regions, []);
    const turns = made.answers.filter((one) => one.text);
    const one = answer(question);
    made.answers = [...turns, one];
    this.store.set({ entries: going ? [...entries] : [...entries, made] });
    await this.run(made, [one], async (signal, began) => {
      const asked = messages(picture.url, regions.map(wire), turns, question);
      for await (const { delta, finish } of api.chat({ model: model || undefined, messages: asked, temperature: 0, ...this.longest() }, signal)) {
        grow(one, delta, began);
        if (finish) Object.assign(one, { finish, state: "done", took: since(began) });
        this.changed(made);
      }
    });
    return one;
  }

  longest() { return this.state.longest ? { max_tokens: this.state.longest } : {}; }

  async run(made, answers, receive) {
    this.control = new AbortController();
    this.store.set({ busy: true });
    try {
      await receive(this.control.signal, performance.now());
      settle(answers, "done");
    } catch (error) {
      const stopped = error.name === "AbortError";
      settle(answers, stopped ? "stopped" : "failed", stopped ? null : error.message);
      if (!stopped) this.fail(error);
    } finally {
      this.store.set({ busy: false });
      this.changed(made);
      this.ended(made, answers);
    }
  }

  /** Stop what is streaming; the server hears of it, and stops, too. */
  stop() { this.control?.abort(); }

  /** Take the last turn back; returns its question. */
  takeBack(made) {
    const gone = made.answers.at(-1);
    made.answers = made.answers.slice(0, -1);
    const { entries } = this.state;
    this.store.set({ entries: made.answers.length ? [...entries] : entries.filter((one) => one !== made) });
    return gone.question;
  }

  /** Begin a new conversation with the next question. */
  close() {
    const going = this.open();
    if (going) going.closed = true;
    this.store.set({ entries: [...this.state.entries] });
  }

  remove(made) { this.store.set({ entries: this.state.entries.filter((one) => one !== made) }); }
}

function grow(one, delta, began) {
  if (!delta) return;
  one.first ??= since(began);
  one.text += delta;
  if (one.state === "waiting") one.state = "streaming";
}

function settle(answers, state, error = null) {
  for (const one of answers) {
    if (one.state === "waiting" || one.state === "streaming") Object.assign(one, { state, error });
  }
}

const since = (began) => (performance.now() - began) / 1000;
