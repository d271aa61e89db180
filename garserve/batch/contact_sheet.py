"""A contact sheet: a random sample of an output as one picture."""

import random
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from garserve.batch.journal import read_rows
from garserve.batch.row_images import RowImages, Shown, row_masks, thumbnail
from garserve.errors import GarserveError, RequestError
from garserve.pictures import COLOURS, one_line

_SIDE, _TEXT, _GAP = 300, 84, 12  # pixels: a picture's longer side, the room for its text, between the fields
_ACROSS = 4
_LINES, _CHARACTERS = 4, 46


def write_contact_sheet(output: Path, target: Path, count: int, *, seed: int = 0, folder: Path | None = None) -> Shown:
    """Draw `count` rows of an output, chosen evenly at random, into a PNG; return what it shows.

    `folder` is where the pictures lie now. Raises RequestError where the output has no rows or is none.
    """
    chosen = _sample(output, count, random.Random(seed))
    if not chosen:
        raise RequestError(f"{output}: expected rows of a job, got none")
    across = min(_ACROSS, len(chosen))
    down = -(-len(chosen) // across)
    width, height = _SIDE + _GAP, _SIDE + _TEXT + _GAP
    sheet = Image.new("RGB", (across * width + _GAP, down * height + _GAP), "white")
    images = RowImages(folder)
    for number, row in enumerate(chosen):
        field = _field(row, images)
        sheet.paste(field, (_GAP + number % across * width, _GAP + number // across * height))
    try:
        sheet.save(target, "PNG")
    except OSError as error:
        raise GarserveError(f"contact sheet {target}: cannot be written ({error.strerror or error})") from None
    return Shown(len(chosen), len(images.missing))


def _sample(output: Path, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Choose rows in one pass, each as probable as any other, and keep their order."""
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, row in enumerate(read_rows(output)):
        if len(kept) < count:
            kept.append((number, row))
        elif (place := chance.randint(0, number)) < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _field(row: dict[str, Any], images: RowImages) -> Image.Image:
    field = Image.new("RGB", (_SIDE, _SIDE + _TEXT), "white")
    name = row.get("image")
    image = images.read(name) if isinstance(name, str) else None
    if image is not None:
        field.paste(_tinted(thumbnail(image, _SIDE), row), (0, 0))
    pen = ImageDraw.Draw(field)
    text = str(row.get("text", f"error: {row.get('error')}"))
    lines = wrap(one_line(text), _CHARACTERS, max_lines=_LINES - 1, placeholder=" ...") or ["(empty)"]
    for number, line in enumerate([one_line(str(row["id"]))[:_CHARACTERS], *lines]):
        colour = "#777777" if number == 0 else "#c0392b" if "error" in row else "black"
        pen.text((0, _SIDE + 4 + 19 * number), line, colour, font=ImageFont.load_default(13))
    return field


def _tinted(image: Any, row: dict[str, Any]) -> Image.Image:
    tinted = image.astype(np.float32)
    for number, mask in enumerate(row_masks(row, *image.shape[:2])):
        colour = COLOURS[number % len(COLOURS)]
        value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
        inner = mask.copy()
        inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        edge = mask & ~inner
        edge[1:] |= edge[:-1] & mask[1:]
        tinted[mask] = tinted[mask] * 0.66 + value * 0.34
        tinted[edge] = value
    return Image.fromarray(tinted.round().astype(np.uint8))
