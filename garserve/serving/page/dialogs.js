// Settings, shortcuts, and the request as code.
import * as api from "./api.js";
import { $, copied } from "./elements.js";
import { wire } from "./regions.js";
import { curl, python } from "./snippets.js";

export class Dialogs {
  constructor(store, { talk, tell, keyed }) {
    Object.assign(this, { store, talk, tell });
    for (const [button, dialog] of [["settings", "settings-dialog"], ["help", "help-dialog"], ["code", "code-dialog"]]) {
      $(button).addEventListener("click", () => this.open(dialog));
    }
    for (const dialog of document.querySelectorAll("dialog")) {
      dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
      dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    }
    $("settings-dialog").addEventListener("close", () => this.save(keyed));
    $("settings-form").addEventListener("submit", (event) => { event.preventDefault(); $("settings-dialog").close(); });
    for (const tab of $("code-dialog").querySelectorAll("[role=tab]")) {
      tab.addEventListener("click", () => this.choose(tab));
      tab.addEventListener("keydown", (event) => this.turn(event));
    }
    $("copy-code").addEventListener("click", () => this.copy());
  }

  open(name) {
    if (name === "settings-dialog") {
      $("key").value = api.key.get();
      $("longest").value = this.store.state.longest ?? "";
    }
    if (name === "code-dialog") this.write();
    $(name).showModal();
  }

  save(keyed) {
    const longest = Number.parseInt($("longest").value, 10);
    this.store.set({ longest: longest > 0 ? longest : null });
    const before = api.key.get();
    api.key.set($("key").value.trim());
    if (api.key.get() !== before) keyed();
  }

  choose(tab) {
    for (const other of $("code-dialog").querySelectorAll("[role=tab]")) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    tab.focus();
    this.write();
  }

  turn(event) {
    const tabs = [...$("code-dialog").querySelectorAll("[role=tab]")], step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) this.choose(tabs.at((tabs.indexOf(event.target) + step) % tabs.length));
  }

  write() {
    const language = $("code-dialog").querySelector("[aria-selected=true]").dataset.language;
    $("code-text").textContent = { curl, python }[language](this.asked());
    const { picture } = this.store.state;
    $("as-sent").hidden = !picture.changed;
    if (picture.changed) Object.assign($("save-picture"), { href: picture.url, download: picture.name });
  }

  // The question that stands in the field, else the last one of the open conversation, else the descriptions.
  asked() {
    const { picture, regions, model, longest } = this.store.state, going = this.talk.open();
    const turns = (going?.answers ?? []).filter((one) => one.state === "done");
    const typed = $("question").value.trim();
    const last = typed ? null : turns.pop();
    return {
      base: api.at("./"), name: picture.name, type: picture.url.slice(5, picture.url.indexOf(";")), keyed: Boolean(api.key.get()),
      model, longest, regions: regions.map(wire), question: typed || last?.question, turns,
    };
  }

  async copy() {
    this.tell((await copied($("code-text").textContent)) ? "Copied." : "The browser does not let the page copy.", true);
  }
}
