// The names by which questions and answers call the regions: <Prompt0>, <Prompt1>, …

/** As many as there are colours (style.css), which are those of garserve's pictures and reports. */
export const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00"];

const NAME = /<Prompt(\d+)>/g;

/** The name of the region at a position. */
export const nameOf = (position) => `<Prompt${position}>`;

/** The positions that a text names, each once. */
export function named(text) {
  return [...new Set([...text.matchAll(NAME)].map((match) => Number(match[1])))];
}

/** A text in pieces: strings, and numbers where a region is named. */
export function pieces(text) {
  return text.split(NAME).map((piece, i) => (i % 2 ? Number(piece) : piece)).filter((piece) => piece !== "");
}

/** A text after the region at `gone` was deleted: later ones move up, its own name stays as a word. */
export function without(text, gone) {
  return text.replace(NAME, (name, digits) => {
    const position = Number(digits);
    return position === gone ? "it" : position > gone ? nameOf(position - 1) : name;
  });
}
