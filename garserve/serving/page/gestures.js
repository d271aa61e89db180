// From the way of a pointer (or of the keyboard's pen) to a shape. Points are pixels of the picture.
import { boxed, inside } from "./regions.js";

const MOST_POINTS = 400; // of an outline: more than a hand draws, and less than a server refuses

/** Begin to draw with a tool. */
export function begin(tool, point, brush, picture) {
  return { tool, brush, picture, way: [inside(point, picture)] };
}

/** Go on to a point. */
export function extend(gesture, point) {
  const here = inside(point, gesture.picture), [x, y] = gesture.way.at(-1);
  if (here[0] !== x || here[1] !== y) gesture.way.push(here);
}

/** The region that has come so far, or null where it is nothing yet. */
export function drawn({ tool, brush, picture, way }) {
  if (tool === "point") return { shape: { points: [way.at(-1)], radius: brush / 2 } };
  if (tool === "box") return way.length > 1 ? boxed(way[0], way.at(-1), picture) : null;
  if (tool === "scribble") return way.length > 1 ? { shape: { scribble: way, width: brush } } : null;
  return way.length > 2 ? { shape: { polygon: way } } : null;
}

/** The finished region; null for what is too small to have been meant (`least` pixels). */
export function finished(gesture, least) {
  const region = drawn(gesture);
  if (!region || gesture.tool === "point") return region;
  const spread = (k) => Math.max(...gesture.way.map((point) => point[k])) - Math.min(...gesture.way.map((point) => point[k]));
  const [wide, high] = [spread(0), spread(1)];
  const flat = gesture.tool !== "scribble" && Math.min(wide, high) < Math.min(least, 2);
  if (flat || Math.max(wide, high) < least) return null;
  const { shape } = region;
  if (shape.polygon) return { shape: { polygon: simplified(shape.polygon, least / 4) } };
  if (shape.scribble) return { shape: { scribble: simplified(shape.scribble, least / 4), width: shape.width } };
  return region;
}

// Fewer points whose line stays within `tolerance` of the drawn one (Douglas and Peucker's way).
function simplified(points, tolerance) {
  let kept = thinned(points, tolerance);
  while (kept.length > MOST_POINTS) kept = thinned(kept, (tolerance *= 2));
  return kept.length > 2 ? kept : points;
}

function thinned(points, tolerance) {
  const keep = new Uint8Array(points.length).fill(0);
  keep[0] = keep[points.length - 1] = 1;
  const open = [[0, points.length - 1]];
  while (open.length) {
    const [first, last] = open.pop();
    let worst = tolerance, place = -1;
    for (let i = first + 1; i < last; i++) {
      const distance = away(points[i], points[first], points[last]);
      if (distance > worst) [worst, place] = [distance, i];
    }
    if (place < 0) continue;
    keep[place] = 1;
    open.push([first, place], [place, last]);
  }
  return points.filter((_, i) => keep[i]);
}

function away([x, y], [ax, ay], [bx, by]) {
  const [dx, dy] = [bx - ax, by - ay], length = dx * dx + dy * dy;
  const t = length ? Math.min(Math.max(((x - ax) * dx + (y - ay) * dy) / length, 0), 1) : 0;
  return Math.hypot(x - ax - t * dx, y - ay - t * dy);
}
