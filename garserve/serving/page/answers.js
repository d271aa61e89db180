// The list of answers: each entry keeps the colours of the regions it speaks of.
import { $, badge, coloured, copied, iconButton, make } from "./elements.js";

export class Answers {
  /** `light(entry, position)` shows a region that is pointed at (-1: none); `talk` is asked to take turns back. */
  constructor(store, { talk, light, again, tell }) {
    Object.assign(this, { store, talk, light, again, tell });
    this.shown = new Map();
    this.list = $("answers");
    store.on(["entries", "picture", "regions"], () => this.render());
    for (const [event, on] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]]) {
      this.list.addEventListener(event, ({ target }) => this.pointed(target, on));
    }
  }

  render() {
    const { entries } = this.store.state;
    for (const [entry, article] of this.shown) {
      if (!entries.includes(entry)) {
        article.remove();
        this.shown.delete(entry);
      }
    }
    for (const entry of entries) this.update(entry, true);
    $("nothing-yet").hidden = entries.length > 0;
  }

  /** Show an entry as it is now. */
  update(entry, quiet = false) {
    if (!this.store.state.entries.includes(entry)) return;
    if (!this.shown.has(entry)) {
      this.shown.set(entry, this.list.appendChild(make("article", { data: { kind: entry.kind, entry: entry.id } })));
      quiet = false;
    }
    const article = this.shown.get(entry);
    article.classList.toggle("past", !this.current(entry));
    const key = JSON.stringify([entry.answers, this.current(entry), entry.closed]);
    if (article.key === key) return;
    article.key = key;
    article.replaceChildren(this.head(entry), ...entry.answers.map((one, i) => (entry.kind === "chat" ? turn(one) : row(one, i))));
    if (!quiet) this.follow(article);
  }

  current({ picture, regions }) {
    const state = this.store.state;
    return picture === state.picture && regions === state.regions;
  }

  // Keep the end of the list in sight, unless a person has scrolled away from it.
  follow(article) {
    const box = $("talk");
    if (box.scrollHeight <= box.clientHeight) return article.scrollIntoView({ block: "nearest" }); // the window scrolls
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 160 || this.list.lastElementChild === article && article.childElementCount === 2) {
      box.scrollTop = box.scrollHeight;
    }
    return undefined;
  }

  head(entry) {
    const title = entry.kind === "chat" ? "Conversation" : entry.answers.length > 1 ? "Descriptions" : "Description";
    const running = entry.answers.some(({ state }) => state === "waiting" || state === "streaming");
    const tools = make("span", { className: "tools" });
    if (!this.current(entry)) tools.append(iconButton("restore", "Show this picture and these regions again", () => this.again(entry)));
    if (!running) {
      tools.append(iconButton("copy", "Copy the text", () => this.copy(entry)));
      if (entry.kind === "chat") tools.append(iconButton("undo", "Take the last question back", () => this.takeBack(entry)));
      tools.append(iconButton("close", "Remove from the list", () => this.remove(entry)));
    }
    const took = running || entry.kind === "chat" ? null : Math.max(...entry.answers.map((one) => one.took ?? 0));
    return make("header", {}, make("h3", { textContent: took ? `${title} · ${seconds(took)}` : title }), tools);
  }

  remove(entry) {
    this.talk.remove(entry);
    $("talk").focus({ preventScroll: true });
  }

  async copy(entry) {
    const lines = entry.answers.map(({ question, text }, i) => (question === null ? `<Prompt${i}>: ${text}` : `${question}\n${text}`));
    this.tell((await copied(lines.join("\n\n"))) ? "Copied." : "The browser does not let the page copy.", true);
  }

  takeBack(entry) {
    const field = $("question");
    const question = this.talk.takeBack(entry);
    if (!field.value) field.value = question;
    field.dispatchEvent(new Event("input"));
    field.focus();
  }

  pointed(target, on) {
    const mark = target.closest?.("[data-region]"), article = target.closest?.("article");
    const entry = article && [...this.shown].find(([, shown]) => shown === article)?.[0];
    if (mark && entry) this.light(on ? entry : null, on ? Number(mark.dataset.region) : -1);
  }
}

function turn(one) {
  return make("div", { className: "turn" }, make("p", { className: "question" }, ...coloured(one.question)), said(one), notes(one, true));
}

function row(one, position) {
  return make("div", { className: "row", data: { region: position } }, badge(position), make("div", {}, said(one), notes(one)));
}

function said(one) {
  const text = make("p", { className: "answer", data: { state: one.state } }, ...coloured(one.text));
  if (one.state === "waiting" || one.state === "streaming") text.append(make("span", { className: "caret", aria: { hidden: "true" } }));
  return text;
}

function notes(one, timed = false) {
  const found = [];
  if (one.state === "stopped") found.push("stopped");
  if (one.state === "done" && !one.text) found.push("an empty answer");
  if (one.finish === "length") found.push("cut at the longest answer");
  if (timed && one.first !== null && one.state === "done") found.push(`first word after ${seconds(one.first)}`);
  if (timed && one.took !== null) found.push(`${seconds(one.took)} in all`);
  const line = make("p", { className: "notes", textContent: found.join(" · ") });
  return one.error ? make("p", { className: "error", textContent: one.error }) : line;
}

const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`);
