"""Regions of an image in every form users have them, each to one boolean mask [H, W] and one normalised box.

Coordinates are pixels of the upright image: x to the right, y down, (0, 0) the top left corner of the first pixel.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from garserve.errors import RegionError
from garserve.inputs.shapes import Box, BoxShape, Mask, MaskShape, PolygonShape, RLEShape, Shape, StrokeShape


@dataclass(frozen=True)
class Region:
    """One region of an image. Make it with one of the `from_…` constructors, or with `parse` from JSON data."""

    shape: Shape

    def mask(self, height: int, width: int) -> Mask:
        """Return the region as a boolean mask [height, width] with at least one pixel.

        Raises RegionError where the region is malformed, does not fit an image of this size, or covers no pixel.
        """
        mask = self.shape.draw(height, width)
        if not mask.any():
            raise RegionError(
                f"{self.shape.kind}: covers no pixel of the {width}x{height} image; expected at least one"
            )
        return mask

    @staticmethod
    def from_mask(mask: NDArray[Any] | Image.Image | str | os.PathLike[str], *, value: float | None = None) -> "Region":
        """Use a binary mask of the image's size: array [H, W] (non-zero is inside), PIL image or image file.

        Of an image with an alpha channel in which some pixel is fully transparent, the alpha is the mask. In a JPEG, an
        AVIF or a lossy WebP, 128 and more is inside: compression leaves noise. With `value`, only that value is inside,
        whatever the others are (of a palette picture: that index).
        """
        return Region(MaskShape(mask, value))

    @staticmethod
    def from_box(box: Sequence[float], *, clip: bool = False) -> "Region":
        """Use a box [x1, y1, x2, y2] in pixels; the pixels that it touches are inside.

        A box more than a pixel beyond the image is an error unless `clip` is true.
        """
        return Region(BoxShape(_numbers("box", box, 4), clip))

    @staticmethod
    def from_xywh(box: Sequence[float], *, clip: bool = False) -> "Region":
        """Use a box [x, y, width, height] in pixels, COCO's order."""
        x, y, width, height = _numbers("xywh", box, 4)
        return Region(BoxShape((x, y, x + width, y + height), clip))

    @staticmethod
    def from_polygon(polygon: Sequence[Any]) -> "Region":
        """Use a polygon [[x, y], ...], COCO's flat [x1, y1, x2, y2, ...], or a list of such polygons (their union)."""
        return Region(PolygonShape(_polygons(polygon)))

    @staticmethod
    def from_rle(rle: dict[str, Any]) -> "Region":
        """Use a COCO RLE {"size": [height, width], "counts": ...}, compressed (string or bytes) or a list of runs."""
        return Region(RLEShape(rle))

    @staticmethod
    def from_points(points: Sequence[Any], *, radius: float = 8.0) -> "Region":
        """Use one point [x, y] or several: a disc of `radius` pixels around each."""
        return Region(StrokeShape(_points("points", points), _number("points: radius", radius), joined=False))

    @staticmethod
    def from_scribble(points: Sequence[Any], *, width: float = 8.0) -> "Region":
        """Use a line through at least two points, `width` pixels wide with round ends."""
        line = _points("scribble", points)
        if len(line) < 2:
            raise RegionError(f"scribble: expected at least two points, got {len(line)}")
        return Region(StrokeShape(line, _number("scribble: width", width) / 2, joined=True))

    @staticmethod
    def parse(data: Any) -> "Region":
        """Make a region from JSON data: {"box": …}, {"xywh": …}, {"polygon": …}, {"rle": …}, {"points": …},
        {"scribble": …}, {"mask": path} or {"mask": path, "value": 7}; a Region is returned as it is, four bare numbers
        are a box.

        Raises RegionError naming the field that cannot be used.
        """
        if isinstance(data, Region):
            return data
        if isinstance(data, Image.Image) or (isinstance(data, np.ndarray) and data.ndim == 2 and data.shape != (1, 4)):
            return Region.from_mask(data)
        if isinstance(data, dict):
            return _from_fields(data)
        if isinstance(data, list | tuple | np.ndarray) and len(data) == 4 and all(np.isscalar(v) for v in data):
            return Region.from_box(list(data))
        raise RegionError(
            'region: expected {"box": [x1, y1, x2, y2]}, {"polygon": ...}, {"rle": ...}, {"mask": ...}, '
            f'{{"points": ...}} or {{"scribble": ...}}, got {data!r:.80}'
        )


_FIELDS: dict[str, tuple[Any, frozenset[str]]] = {
    "box": (Region.from_box, frozenset({"clip"})),
    "xywh": (Region.from_xywh, frozenset({"clip"})),
    "polygon": (Region.from_polygon, frozenset()),
    "rle": (Region.from_rle, frozenset()),
    "points": (Region.from_points, frozenset({"radius"})),
    "scribble": (Region.from_scribble, frozenset({"width"})),
    "mask": (Region.from_mask, frozenset({"value"})),
}


def _from_fields(data: dict[str, Any]) -> Region:
    if "counts" in data and "size" in data:
        return Region.from_rle(data)
    kinds = [key for key in data if key in _FIELDS]
    if len(kinds) != 1:
        raise RegionError(
            f"region: expected exactly one of {', '.join(_FIELDS)}, got the fields {sorted(map(str, data))}"
        )
    kind = kinds[0]
    make, options = _FIELDS[kind]
    unknown = sorted(str(key) for key in set(data) - options - {kind})
    if unknown:
        raise RegionError(f"region: {kind} has no field {unknown[0]!r}; it takes {sorted(options) or 'no options'}")
    given = {key: data[key] for key in options & set(data)}
    for key, value in given.items():
        good = isinstance(value, bool) if key == "clip" else _is_number(value)
        if not good:
            raise RegionError(
                f"{kind}: {key}: expected {'true or false' if key == 'clip' else 'a number'}, got {value!r:.80}"
            )
    return make(data[kind], **given)


def _is_number(value: Any) -> bool:
    """Say whether a value is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _number(field: str, value: Any) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    if not _is_number(value):
        raise RegionError(f"{field}: expected a number, got {value!r:.80}")
    return float(value)


def normalised_box(mask: Mask) -> Box:
    """Return x_min/W, y_min/H, x_max/W, y_max/H of a mask [H, W], by inclusive pixel indices as the authors do."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float(columns[-1] / width),
        float(rows[-1] / height),
    )


def _numbers(kind: str, values: Any, count: int | None = None) -> Any:
    try:
        if isinstance(values, str | bytes) or any(isinstance(value, str | bytes | bool) for value in values):
            raise TypeError
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise RegionError(f"{kind}: expected numbers, got {values!r:.80}") from None
    except OverflowError:
        raise RegionError(f"{kind}: expected finite numbers, got {values!r:.80}") from None
    if count is not None and len(numbers) != count:
        raise RegionError(f"{kind}: expected {count} numbers, got {len(numbers)}")
    if not all(math.isfinite(number) for number in numbers):
        raise RegionError(f"{kind}: expected finite numbers, got {list(numbers)!r:.80}")
    return numbers


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _points(kind: str, points: Any) -> tuple[tuple[float, float], ...]:
    if not _is_list(points):
        raise RegionError(f"{kind}: expected [[x, y], ...], got {points!r:.80}")
    if len(points) == 2 and all(np.isscalar(value) for value in points):
        points = [points]
    if len(points) == 0:
        raise RegionError(f"{kind}: expected at least one point, got none")
    return tuple(_numbers(kind, point, 2) for point in points)


def _polygons(polygon: Any) -> tuple[tuple[float, ...], ...]:
    if not _is_list(polygon) or len(polygon) == 0:
        raise RegionError(f"polygon: expected [[x, y], ...] or a list of such lists, got {polygon!r:.80}")
    first = polygon[0]
    if np.isscalar(first):
        rings = [polygon]
    elif _is_list(first) and len(first) == 2 and all(np.isscalar(value) for value in first):
        rings = [[value for point in polygon for value in _numbers("polygon", point, 2)]]
    else:
        return tuple(ring for part in polygon for ring in _polygons(part))
    flat = _numbers("polygon", rings[0])
    if len(flat) % 2 or len(flat) < 6:
        raise RegionError(f"polygon: expected at least three points, got {len(flat) / 2:g}")
    return (flat,)
