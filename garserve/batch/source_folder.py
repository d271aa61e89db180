"""A folder of images with masks of the same names: images/ and masks/ in it, or pictures with PNGs beside them.

A mask of one value is one region. A palette picture, or a grey one of several values, has one region for each value;
0 is the background, and 255 of a palette the border that belongs to nobody (as in Pascal VOC).
"""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from garserve.batch.record import Record
from garserve.batch.source import Reading
from garserve.errors import InputError, RequestError
from garserve.inputs.images import load_mask

# Of all that is opened as an image (inputs.images.FORMATS).
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
SUFFIXES |= {".avif", ".ppm", ".pgm", ".pbm", ".pnm"}
_VOID = 255


class FolderSource:
    """One record a region; ids are NAME, or NAME:VALUE where a mask has several."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        inner = path / "images"
        self._images = reading.images or (inner if inner.is_dir() else path)
        inner = path / "masks"
        self._masks = reading.masks or (inner if inner.is_dir() else self._images)

    def records(self) -> Iterator[Record]:
        """Yield every region, picture by picture in the order of their names; then masks that have no picture."""
        names = [name for name in os.listdir(self._images) if os.path.splitext(name)[1].lower() in SUFFIXES]
        images = [self._images / name for name in sorted(names) if os.path.isfile(self._images / name)]
        stems = Counter(image.stem for image in images)
        pngs = sorted(name for name in os.listdir(self._masks) if os.path.splitext(name)[1].lower() == ".png")
        masks = {os.path.splitext(name)[0]: name for name in pngs}  # the last of .PNG, .Png and .png is .png
        for image in images:
            mask = self._masks / masks.get(image.stem, f"{image.stem}.png")
            if mask != image:
                yield from self._regions(image, mask)
            elif stems[image.stem] == 1:  # otherwise it is the mask of the picture beside it
                error = "mask: expected a PNG of this name beside a picture of another format, or in masks/ (--masks)"
                yield Record(image.name, image.stem, image_name=os.path.abspath(image), error=error)
        if self._masks != self._images:
            yield from self._without_picture(pngs, stems)

    def _without_picture(self, pngs: Iterable[str], stems: Container[str]) -> Iterator[Record]:
        for name in pngs:
            stem = os.path.splitext(name)[0]
            if stem not in stems and not name.startswith("."):
                yield Record(name, stem, error=f"image: no picture of this name in {self._images}")

    def _regions(self, image: Path, mask: Path) -> Iterator[Record]:
        place, name = image.name, os.path.abspath(image)
        try:
            if not os.path.isfile(mask):
                raise RequestError(f"mask: no such file: {mask}")
            values, named = mask_values(mask)
        except InputError as error:
            yield Record(place, image.stem, image_name=name, error=str(error))
            return
        path = os.path.abspath(mask)
        if len(values) <= 1:  # none at all is refused where the region is drawn
            region: dict[str, Any] = {"mask": path}
            if named and values:
                region["value"] = next(iter(values))
            yield Record(place, image.stem, name, name, (region,), area=sum(values.values()))
            return
        for value, pixels in values.items():
            region = {"mask": path, "value": value}
            yield Record(f"{place} value {value}", f"{image.stem}:{value}", name, name, (region,), area=pixels)


def mask_values(path: Path) -> tuple[dict[int, int], bool]:
    """Return the values of a mask picture that mark regions, with their pixels; and whether one alone has to be named:
    there is a border, too, or the palette's colours would say something else than its values.
    """
    picture = _mask_picture(path)
    palette = picture.mode == "P"
    values, counts = np.unique(np.asarray(picture), return_counts=True)
    found = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value != 0}
    border = palette and len(found) > 1 and found.pop(_VOID, None) is not None
    coloured = palette and ("transparency" in picture.info or any((picture.getpalette("RGB") or [0])[:3]))
    return found, border or coloured


def _mask_picture(path: Path) -> Image.Image:
    picture = load_mask(path)
    if len(picture.getbands()) > 1:
        raise RequestError(f"mask {path}: expected a grey, black-and-white or palette picture, got mode {picture.mode}")
    return picture
