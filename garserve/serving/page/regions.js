// Regions of a picture, in its pixels. A region is {shape, rle}: the shape as it was drawn, in the server's own form
// ({box}, {polygon}, {points, radius} or {scribble, width}), and the refined mask that stands for it, if there is one.
// Regions are never changed in place: undo keeps them.
import { decode } from "./rle.js";

const scratch = document.createElement("canvas").getContext("2d");
const masks = new WeakMap();

/** The region as the server takes it. */
export const wire = (region) => (region.rle ? { rle: region.rle } : region.shape);

/** What a person calls it. */
export function kindOf({ shape, rle }) {
  const kind = shape.box ? "Box" : shape.polygon ? "Lasso" : shape.scribble ? "Scribble" : shape.points.length > 1 ? "Points" : "Point";
  return rle ? `${kind}, refined` : kind;
}

/** The refined mask as bytes, row by row; decoded once. */
export function maskOf(rle) {
  if (!masks.has(rle)) masks.set(rle, decode(rle));
  return masks.get(rle);
}

/** The smallest [x1, y1, x2, y2] around it. */
export function bounds(region) {
  const { shape, rle } = region;
  if (rle) return maskBounds(rle);
  if (shape.box) return shape.box;
  const points = shape.polygon ?? shape.points ?? shape.scribble;
  const reach = shape.radius ?? (shape.width ?? 0) / 2;
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  return [Math.min(...xs) - reach, Math.min(...ys) - reach, Math.max(...xs) + reach, Math.max(...ys) + reach];
}

function maskBounds(rle) {
  const [height, width] = rle.size, mask = maskOf(rle);
  let [x1, y1, x2, y2] = [width, height, 0, 0];
  for (let i = mask.indexOf(1); i >= 0; i = mask.indexOf(1, i + 1)) {
    const x = i % width, y = (i - x) / width;
    x1 = Math.min(x1, x), x2 = Math.max(x2, x + 1), y1 = Math.min(y1, y), y2 = Math.max(y2, y + 1);
  }
  return x2 > x1 ? [x1, y1, x2, y2] : [0, 0, width, height];
}

/** Its outline as a path; a scribble's is the line itself. */
export function outline(shape) {
  const path = new Path2D();
  if (shape.box) {
    const [x1, y1, x2, y2] = shape.box;
    path.rect(x1, y1, x2 - x1, y2 - y1);
  } else if (shape.points) {
    for (const [x, y] of shape.points) {
      path.moveTo(x + shape.radius, y);
      path.arc(x, y, shape.radius, 0, 2 * Math.PI);
    }
  } else {
    (shape.polygon ?? shape.scribble).forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
    if (shape.polygon) path.closePath();
  }
  return path;
}

/** Whether a point lies in it, or within `slack` pixels of its line. */
export function contains(region, [x, y], slack = 0) {
  const { shape, rle } = region;
  if (rle) {
    const [height, width] = rle.size;
    return x >= 0 && y >= 0 && x < width && y < height && maskOf(rle)[Math.floor(y) * width + Math.floor(x)] === 1;
  }
  const path = outline(shape);
  scratch.lineWidth = (shape.width ?? 0) + 2 * slack || 1;
  scratch.lineCap = scratch.lineJoin = "round";
  return scratch.isPointInStroke(path, x, y) || (!shape.scribble && scratch.isPointInPath(path, x, y));
}

/** The position of the smallest region at a point, or -1. */
export function regionAt(regions, point, slack) {
  const size = (region) => { const [x1, y1, x2, y2] = bounds(region); return (x2 - x1) * (y2 - y1); };
  const here = regions.map((region, i) => [size(region), i]).filter(([, i]) => contains(regions[i], point, slack));
  return here.length ? here.sort(([a, i], [b, j]) => a - b || j - i)[0][1] : -1;
}

/** The region moved, kept inside the picture; what was refined is its drawn shape again. */
export function moved({ shape }, dx, dy, { width, height }) {
  const points = shape.box ? [shape.box.slice(0, 2), shape.box.slice(2)] : (shape.polygon ?? shape.points ?? shape.scribble);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const x = clamp(dx, -Math.min(...xs), width - Math.max(...xs));
  const y = clamp(dy, -Math.min(...ys), height - Math.max(...ys));
  const there = points.map((point) => [round(point[0] + x), round(point[1] + y)]);
  if (shape.box) return { shape: { box: there.flat() } };
  return { shape: Object.fromEntries(Object.entries(shape).map(([key, value]) => [key, Array.isArray(value) ? there : value])) };
}

/** Points with one more; what was refined is its drawn shape again. */
export function joined({ shape }, [x, y], { width, height }) {
  const point = [clamp(Math.round(x), 0, width), clamp(Math.round(y), 0, height)];
  return { shape: { ...shape, points: [...shape.points, point] } };
}

/** A box with one corner (0 top left, 1 top right, 2 bottom right, 3 bottom left) brought to a point. */
export function resized({ shape }, corner, [x, y], picture) {
  const [x1, y1, x2, y2] = shape.box;
  const fixed = [[x2, y2], [x1, y2], [x1, y1], [x2, y1]][corner];
  return boxed(fixed, [x, y], picture);
}

/** A box between two corners, of whole pixels, at least one wide and high. */
export function boxed([ax, ay], [bx, by], { width, height }) {
  const side = (a, b, most) => {
    const low = clamp(Math.round(Math.min(a, b)), 0, most - 1);
    return [low, clamp(Math.round(Math.max(a, b)), low + 1, most)];
  };
  const [x1, x2] = side(ax, bx, width), [y1, y2] = side(ay, by, height);
  return { shape: { box: [x1, y1, x2, y2] } };
}

/** Corners of a box, for handles. */
export function corners({ shape, rle }) {
  if (!shape.box || rle) return [];
  const [x1, y1, x2, y2] = shape.box;
  return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]];
}

/** A point brought into the picture. */
export const inside = ([x, y], { width, height }) => [round(clamp(x, 0, width)), round(clamp(y, 0, height))];

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const round = (value) => Math.round(value * 10) / 10;
