// COCO's compressed run-length encoding: how refined masks come from the server.

// Runs of pixels, column by column, the first one outside: from the text of `counts`, or the list itself.
function runs(counts) {
  if (Array.isArray(counts)) return counts;
  const found = [];
  let value = 0, shift = 0;
  for (const character of counts) {
    const code = character.charCodeAt(0) - 48;
    value |= (code & 31) << shift;
    shift += 5;
    if (code & 32) continue;
    if (code & 16) value -= 2 ** shift;
    // From the fourth run on, the difference to the run two before is stored.
    found.push(found.length > 2 ? value + found.at(-2) : value);
    value = shift = 0;
  }
  return found;
}

/** A mask as bytes, row by row: 1 inside. `size` is [height, width]. */
export function decode({ size: [height, width], counts }) {
  const mask = new Uint8Array(height * width);
  let position = 0, inside = 0;
  for (const run of runs(counts)) {
    if (inside) {
      for (let i = position; i < position + run; i++) mask[(i % height) * width + Math.floor(i / height)] = 1;
    }
    position += run;
    inside = 1 - inside;
  }
  return mask;
}
