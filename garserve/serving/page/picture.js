// The picture: read from a file, shown upright, and sent so that browser and server see the same pixels.

const MOST_BYTES = 12e6; // larger files are scaled down before they travel
const LONGEST_SIDE = 4096; // no GAR model looks at more than 6 tiles of 448 pixels a side

/** Read a file. Resolves to {name, width, height, bitmap, url, changed}; rejects with a sentence for a person. */
export async function readPicture(file, name = file.name || "picture.png") {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright by its EXIF data, as the server takes it
  } catch {
    throw new Error(`${name}: this browser cannot read it as a picture. JPEG, PNG and WebP always work.`);
  }
  if (await travelsAsItIs(file)) return { name, bitmap, ...sizeOf(bitmap), url: await dataUrl(file), changed: "" };
  const scale = file.size > MOST_BYTES ? Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height)) : 1;
  const canvas = Object.assign(document.createElement("canvas"), {
    width: Math.max(Math.round(bitmap.width * scale), 1), height: Math.max(Math.round(bitmap.height * scale), 1),
  });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // the server lays transparent pixels on white, too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await encoded(canvas);
  const stem = name.replace(/\.[^.]*$/, "") || "picture";
  const ending = blob.type === "image/png" ? "png" : "jpg";
  const changed = scale < 1 ? `scaled from ${bitmap.width} × ${bitmap.height}` : "converted";
  return { name: `${stem}.${ending}`, bitmap: await createImageBitmap(canvas), ...sizeOf(canvas), url: await dataUrl(blob), changed };
}

async function encoded(canvas) {
  const blob = (type) => new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  const png = await blob("image/png");
  const chosen = png && png.size <= MOST_BYTES ? png : await blob("image/jpeg");
  if (!chosen) throw new Error("The picture is too large for this browser.");
  return chosen;
}

const sizeOf = ({ width, height }) => ({ width, height });

// JPEG files, and PNG files without transparency and orientation, mean the same to every reader.
async function travelsAsItIs(file) {
  if (file.size > MOST_BYTES) return false;
  const bytes = new DataView(await file.arrayBuffer());
  if (bytes.byteLength > 3 && bytes.getUint32(0) >>> 8 === 0xffd8ff) return file.type === "image/jpeg";
  if (bytes.byteLength < 33 || bytes.getUint32(0) !== 0x89504e47) return false;
  if (file.type !== "image/png" || bytes.getUint8(25) & 4) return false; // bit 4 of PNG's colour type is alpha
  for (let at = 8; at + 8 <= bytes.byteLength; at += 12 + bytes.getUint32(at)) {
    const chunk = String.fromCharCode(...[4, 5, 6, 7].map((i) => bytes.getUint8(at + i)));
    if (chunk === "tRNS" || chunk === "eXIf" || chunk === "acTL") return false;
    if (chunk === "IDAT") return true;
  }
  return false;
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read any more."));
    reader.readAsDataURL(blob);
  });
}
