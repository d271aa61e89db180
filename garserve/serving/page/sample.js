// The built-in sample: a photograph that comes with garserve, and the regions of `garserve demo`.
import { readPicture } from "./picture.js";

export const REGIONS = [
  { shape: { polygon: [[84, 200], [100, 150], [140, 100], [170, 82], [175, 130], [172, 180], [190, 225], [196, 300], [210, 360], [150, 330], [105, 280]] } },
  { shape: { box: [480, 300, 540, 395] } },
  { shape: { polygon: [[213, 131], [237, 110], [277, 100], [319, 107], [349, 129], [363, 159], [347, 178], [303, 189], [255, 185], [222, 161]] } },
];

/** The sample's picture. */
export async function samplePicture() {
  const response = await fetch(new URL("sample.jpg", import.meta.url));
  if (!response.ok) throw new Error("The sample picture cannot be loaded from this server.");
  return readPicture(new File([await response.blob()], "coffee.jpg", { type: "image/jpeg" }));
}
