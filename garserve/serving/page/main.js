// The page: its parts put together.
import { Answers } from "./answers.js";
import * as api from "./api.js";
import { Composer } from "./composer.js";
import { Dialogs } from "./dialogs.js";
import { Editing } from "./editing.js";
import { $ } from "./elements.js";
import { Keyboard } from "./keyboard.js";
import { calm, fail, tell } from "./notices.js";
import { Panel } from "./panel.js";
import { readPicture } from "./picture.js";
import { Pointer } from "./pointer.js";
import { REGIONS, samplePicture } from "./sample.js";
import { Stage } from "./stage.js";
import { Store } from "./store.js";
import { Talk } from "./talk.js";

const store = new Store({
  picture: null, regions: [], selected: -1, tool: "box", joining: false, brush: null, auto: false, refining: null, steps: null,
  entries: [], busy: false, model: "", prompts: null, longest: null,
});
const stage = new Stage($("canvas"));
const failed = (error) => {
  if (error.status === 401 || error.status === 403) dialogs.open("settings-dialog");
  fail(error);
};
const editing = new Editing(store, { tell, fail: failed, renamed: (gone) => composer.renamed(gone) });
const talk = new Talk(store, {
  fail: failed, changed: (entry) => answers.update(entry),
  ended: (entry, ended) => tell(ended.map(({ text, state }, i) => (entry.kind === "chat" ? text || state : `${i}: ${text || state}`)).join(" ")),
});
const light = (entry, position) => {
  const { picture, regions } = entry ?? store.state;
  stage.show({ picture, regions, lit: position, selected: entry ? -1 : store.state.selected });
};
const again = ({ picture, regions }) => (picture === store.state.picture ? editing.commit(regions, -1) : open(() => picture, regions));
const answers = new Answers(store, { talk, light, again, tell });
const composer = new Composer(store, { talk, fail });
const panel = new Panel(store, { editing, talk, stage, light: (position) => stage.show({ lit: position }) });
const dialogs = new Dialogs(store, { talk, tell, keyed: greet });
const pointer = new Pointer(stage, store, editing);
new Keyboard({
  stage, store, editing, pointer, tell, help: () => dialogs.open("help-dialog"),
  ask: { describe: () => panel.describe(), focus: () => composer.focus() },
});
store.on(["regions", "entries"], calm);
store.on(["picture", "regions", "selected"], ({ picture, regions, selected }) => stage.show({ picture, regions, selected }));

/** Show another picture. */
async function open(read, regions = []) {
  try {
    const picture = await read();
    talk.stop();
    store.set({ brush: Math.max(Math.round(Math.max(picture.width, picture.height) / 30), 2) });
    editing.open(picture, regions);
    return true;
  } catch (error) {
    fail(error);
    return false;
  }
}

/** Ask the server which model it has; without one the page still draws. */
async function greet() {
  try {
    const { id, prompts } = await api.model();
    store.set({ model: id, prompts });
    $("model").textContent = id;
    calm();
  } catch (error) {
    $("model").textContent = "";
    failed(error);
  }
}

const file = $("file");
file.addEventListener("change", () => {
  const [chosen] = file.files;
  file.value = "";
  if (chosen) open(() => readPicture(chosen));
});
for (const button of document.querySelectorAll(".choose-file")) button.addEventListener("click", () => file.click());
for (const button of document.querySelectorAll(".try-sample")) {
  button.addEventListener("click", async () => { if (await open(samplePicture, REGIONS)) panel.describe(); });
}

document.addEventListener("paste", ({ clipboardData }) => {
  const [pasted] = [...clipboardData.files].filter(({ type }) => type.startsWith("image/"));
  if (pasted) open(() => readPicture(pasted, "pasted.png"));
});
let over = 0; // entering a child and leaving its parent come in either order
const hovered = (by) => { over = by ? Math.max(over + by, 0) : 0; document.body.classList.toggle("dropping", over > 0); };
document.addEventListener("dragenter", (event) => { event.preventDefault(); hovered(1); });
document.addEventListener("dragleave", () => hovered(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  hovered(0);
  const [dropped] = event.dataTransfer.files;
  if (dropped) open(() => readPicture(dropped));
  else fail("Only files can be dropped here. Save the picture first, or copy and paste it.");
});

await greet();
