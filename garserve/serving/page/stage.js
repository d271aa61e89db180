// The drawing area: the picture with its regions, fitted or enlarged, sharp at every pixel density.
import { COLOURS } from "./names.js";
import { bounds, clamp, corners, maskOf, outline } from "./regions.js";

const MARGIN = 14; // around the picture: a box can start outside, and handles are not cut off
const MOST_ZOOM = 16;
const INK = "#14171a";

export class Stage {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.scene = { picture: null, regions: [], selected: -1, lit: -1, draft: null, pen: null };
    this.zoom = { factor: 1, x: 0.5, y: 0.5 }; // the point of the picture in the middle, as shares of its sides
    this.masks = new WeakMap();
    this.font = getComputedStyle(document.body).fontFamily;
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  /** Change what is shown. */
  show(patch) {
    if (patch.picture !== undefined && patch.picture !== this.scene.picture) this.zoom = { factor: 1, x: 0.5, y: 0.5 };
    Object.assign(this.scene, patch);
    this.redraw();
  }

  redraw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => { this.pending = 0; this.draw(); });
  }

  /** Where the picture lies: {x, y} of its corner and pixels on the screen for one of its own. */
  view() {
    const { clientWidth: wide, clientHeight: high } = this.canvas, { width, height } = this.scene.picture;
    const fitted = Math.min((wide - 2 * MARGIN) / width, (high - 2 * MARGIN) / height);
    const scale = Math.max(fitted, 0.001) * this.zoom.factor;
    const place = (room, length, share) => {
      const shown = length * scale;
      return shown <= room - 2 * MARGIN + 1 ? (room - shown) / 2 : clamp(room / 2 - share * shown, room - MARGIN - shown, MARGIN);
    };
    return { x: place(wide, width, this.zoom.x), y: place(high, height, this.zoom.y), scale };
  }

  /** The point of the picture under a pointer. */
  toPicture(event) {
    const frame = this.canvas.getBoundingClientRect(), { x, y, scale } = this.view();
    return [(event.clientX - frame.left - x) / scale, (event.clientY - frame.top - y) / scale];
  }

  /** Enlarge about a point of the picture. */
  enlarge(by, [x, y] = [this.zoom.x * this.scene.picture.width, this.zoom.y * this.scene.picture.height]) {
    const { width, height } = this.scene.picture, before = this.zoom.factor;
    const factor = clamp(before * by, 1, MOST_ZOOM), kept = before / factor;
    const middle = (share, at) => clamp(at + (share - at) * kept, 0, 1);
    this.zoom = { factor, x: middle(this.zoom.x, x / width), y: middle(this.zoom.y, y / height) };
    this.redraw();
  }

  /** Move an enlarged picture by pixels of the screen, from where it lies. */
  pan(dx, dy) {
    const { clientWidth: wide, clientHeight: high } = this.canvas, { width, height } = this.scene.picture;
    const { x, y, scale } = this.view();
    this.zoom.x = clamp((wide / 2 - x + dx) / (width * scale), 0, 1);
    this.zoom.y = clamp((high / 2 - y + dy) / (height * scale), 0, 1);
    this.redraw();
  }

  /** Bring a point of the picture into sight, with the least way. */
  reveal([px, py]) {
    const { clientWidth: wide, clientHeight: high } = this.canvas, { x, y, scale } = this.view();
    const hidden = (at, room) => at - clamp(at, MARGIN, room - MARGIN);
    const [dx, dy] = [hidden(x + px * scale, wide), hidden(y + py * scale, high)];
    if (dx || dy) this.pan(dx, dy);
  }

  draw() {
    const { canvas, context, scene } = this, density = devicePixelRatio || 1;
    const size = [Math.round(canvas.clientWidth * density), Math.round(canvas.clientHeight * density)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, ...size);
    if (!scene.picture) return;
    const { x, y, scale } = this.view();
    canvas.dataset.view = `${x} ${y} ${scale}`; // for those who point at it from outside
    context.setTransform(density * scale, 0, 0, density * scale, density * x, density * y);
    context.imageSmoothingEnabled = scale < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(scene.picture.bitmap, 0, 0);
    scene.regions.forEach((region, i) => this.drawRegion(region, i, scale));
    if (scene.draft) this.drawRegion(scene.draft, scene.regions.length, scale);
    scene.regions.forEach((region, i) => this.drawBadge(region, i, scale));
    if (scene.regions[scene.selected]) this.drawHandles(scene.regions[scene.selected], scale);
    if (scene.pen) this.drawPen(scene.pen, scale);
  }

  drawRegion(region, position, scale) {
    const { context, scene } = this, colour = COLOURS[position % COLOURS.length];
    const lit = scene.lit === position || scene.selected === position;
    const dim = scene.lit >= 0 && scene.lit !== position;
    context.save();
    context.globalAlpha = dim ? 0.35 : 1;
    if (region.rle) this.drawMask(region.rle, colour, scale, lit);
    else this.drawShape(region.shape, colour, scale, lit);
    context.restore();
  }

  drawShape(shape, colour, scale, lit) {
    const { context } = this, path = outline(shape), alpha = context.globalAlpha;
    context.lineJoin = context.lineCap = "round";
    context.globalAlpha = alpha * (lit ? 0.42 : 0.26);
    context.fillStyle = context.strokeStyle = colour;
    if (shape.scribble) {
      context.lineWidth = shape.width;
      context.stroke(path);
    } else context.fill(path);
    context.globalAlpha = alpha;
    context.lineWidth = (lit ? 4.5 : 3.5) / scale; // a dark seam keeps the colour visible on every picture
    context.strokeStyle = "#0008";
    context.stroke(path);
    context.lineWidth = (lit ? 2.75 : 2) / scale;
    context.strokeStyle = colour;
    context.stroke(path);
  }

  drawMask(rle, colour, scale, lit) {
    const { context } = this, alpha = context.globalAlpha, [height, width] = rle.size;
    const { fill, ring } = this.layers(rle, colour, scale, lit ? 2.75 : 2);
    context.globalAlpha = alpha * (lit ? 0.42 : 0.26);
    context.drawImage(fill, 0, 0);
    context.globalAlpha = alpha;
    context.drawImage(ring, 0, 0, width, height);
  }

  // A refined mask filled with its colour, and the line around it at the screen's resolution; made anew when it changes.
  layers(rle, colour, scale, line) {
    const density = devicePixelRatio || 1, name = `${colour} ${scale * density} ${line}`;
    if (this.masks.get(rle)?.name !== name) {
      const fill = filled(rle, colour);
      this.masks.set(rle, { name, fill, ring: ringed(fill, Math.min(scale * density, 4096 / Math.max(...rle.size)), line * density) });
    }
    return this.masks.get(rle);
  }

  drawBadge(region, position, scale) {
    const { context, scene } = this, [x1, y1, x2, y2] = bounds(region), side = 22 / scale;
    const out = Math.max(x2 - x1, y2 - y1) < 2 * side ? 0.8 * side : 0; // a small region is not hidden by its number
    const x = clamp(x1 - out, 0, scene.picture.width - side), y = clamp(y1 - out, 0, scene.picture.height - side);
    context.save();
    context.globalAlpha = scene.lit >= 0 && scene.lit !== position ? 0.5 : 1;
    context.fillStyle = COLOURS[position % COLOURS.length];
    context.beginPath();
    context.roundRect(x, y, side, side, 6 / scale);
    context.fill();
    context.fillStyle = INK;
    context.font = `700 ${13 / scale}px ${this.font}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(String(position), x + side / 2, y + side * 0.54);
    context.restore();
  }

  drawHandles(region, scale) {
    const { context } = this, reach = 5 / scale;
    context.lineWidth = 1.5 / scale;
    for (const [x, y] of corners(region)) {
      context.beginPath();
      context.arc(x, y, reach, 0, 2 * Math.PI);
      context.fillStyle = "#fff";
      context.fill();
      context.strokeStyle = INK;
      context.stroke();
    }
    if (corners(region).length) return;
    const [x1, y1, x2, y2] = bounds(region), gap = 4 / scale;
    context.setLineDash([4 / scale, 4 / scale]);
    for (const [colour, offset] of [["#000a", 0], ["#fff", 4 / scale]]) {
      context.strokeStyle = colour;
      context.lineDashOffset = offset;
      context.strokeRect(x1 - gap, y1 - gap, x2 - x1 + 2 * gap, y2 - y1 + 2 * gap);
    }
    context.setLineDash([]);
  }

  drawPen([x, y], scale) {
    const { context } = this, arm = 12 / scale;
    for (const [colour, width] of [["#000c", 4], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / scale;
      context.beginPath();
      context.moveTo(x - arm, y);
      context.lineTo(x + arm, y);
      context.moveTo(x, y - arm);
      context.lineTo(x, y + arm);
      context.stroke();
    }
  }
}

function filled(rle, colour) {
  const [height, width] = rle.size, mask = maskOf(rle), value = parseInt(colour.slice(1), 16);
  const picture = new ImageData(width, height), pixel = [value >> 16, (value >> 8) & 255, value & 255, 255];
  for (let i = mask.indexOf(1); i >= 0; i = mask.indexOf(1, i + 1)) picture.data.set(pixel, 4 * i);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

// What lies within a line's width of the mask, less the mask.
function ringed(fill, scale, line) {
  const width = Math.max(Math.round(fill.width * scale), 1), height = Math.max(Math.round(fill.height * scale), 1);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 3; // as the picture is drawn
  for (let k = 0; k < 12; k++) {
    const angle = (k * Math.PI) / 6;
    context.drawImage(fill, line * Math.cos(angle), line * Math.sin(angle), width, height);
  }
  context.globalCompositeOperation = "destination-out";
  context.drawImage(fill, 0, 0, width, height);
  return canvas;
}
