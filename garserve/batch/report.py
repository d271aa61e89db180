"""A page about an output: pictures with their regions in colours, what was said, and what went wrong."""

import base64
import html
import io
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from garserve.batch.journal import read_rows
from garserve.batch.row_images import RowImages, Shown, row_masks, thumbnail
from garserve.errors import GarserveError, RequestError
from garserve.inputs.shapes import Mask
from garserve.pictures import COLOURS

_LARGEST, _SMALLEST = 480, 128  # pixels of a picture's longer side
_PICTURE_BYTES = 40_000_000  # of all pictures together, about
_BYTES_A_PIXEL = 0.2  # of a JPEG of this quality, about
_QUALITY = 80
_KEPT = ("id", "text", "error", "category", "question", "form", "finish_reason", "place")


@dataclass
class _Page:
    side: int
    images: RowImages
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # base64 of JPEGs
    sizes: list[list[int]] = field(default_factory=list)  # width, height
    _known: dict[str, int | None] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; a picture that several rows name is kept once."""
        shown = {name: row[name] for name in _KEPT if row.get(name) is not None}
        if "id" in shown:
            shown["id"] = str(shown["id"])  # JavaScript rounds numbers beyond 2**53
        name = row.get("image")
        if isinstance(name, str):
            shown["image"] = name
            if name not in self._known:
                self._known[name] = self._picture(name)
            if (number := self._known[name]) is not None:
                width, height = self.sizes[number]
                shown |= {"picture": number, "runs": [_runs(mask) for mask in row_masks(row, height, width)]}
        self.rows.append(shown)

    def _picture(self, name: str) -> int | None:
        image = self.images.read(name)
        if image is None:
            return None
        small = thumbnail(image, self.side)
        buffer = io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=_QUALITY)
        self.pictures.append(base64.b64encode(buffer.getvalue()).decode())
        self.sizes.append([small.shape[1], small.shape[0]])
        return len(self.pictures) - 1


def write_report(output: Path, target: Path, *, limit: int = 10_000, folder: Path | None = None) -> Shown:
    """Write one self-contained HTML file about the first `limit` rows of an output; return what it shows.

    `folder` is where the pictures lie now. Raises RequestError where the output has no rows or is none.
    """
    names = {row.get("image") for row in islice(read_rows(output), limit)}
    if not names:
        raise RequestError(f"{output}: expected rows of a job, got none")
    side = int(min(_LARGEST, max(_SMALLEST, math.sqrt(_PICTURE_BYTES / _BYTES_A_PIXEL / len(names)))))
    page = _Page(side, RowImages(folder))
    counts: Counter[str] = Counter()
    for number, row in enumerate(read_rows(output)):
        counts["errors" if "error" in row else "answers"] += 1
        if number < limit:
            page.add(row)
    text = _fill((files("garserve.batch") / "report.html").read_text(encoding="utf-8"), output, page, counts)
    try:
        target.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise GarserveError(f"report {target}: cannot be written ({error.strerror})") from None
    return Shown(len(page.rows), len(page.images.missing))


def _fill(template: str, output: Path, page: _Page, counts: Counter[str]) -> str:
    data = {"rows": page.rows, "sizes": page.sizes, "colours": COLOURS}
    pictures = "\n".join(
        f'<script type="text/plain" id="picture{number}">{content}</script>'
        for number, content in enumerate(page.pictures)
    )
    total = counts.total()
    part = "" if total == len(page.rows) else f"the first {len(page.rows):,} of "
    for name, value in {
        "TITLE": html.escape(output.name),
        "ABOUT": f"{part}{total:,} rows, {counts['errors']:,} of them errors",
        "PICTURES": pictures,
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def _runs(mask: Mask) -> str:
    """Return the lengths of a mask's runs row by row, outside first, in base 36."""
    flat = mask.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return " ".join(np.base_repr(length, 36).lower() for length in ([0, *lengths] if flat[0] else lengths))
