"""The forms in which regions come, each drawn to a boolean mask [H, W]."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from garserve.errors import ImageError, RegionError
from garserve.inputs.images import decoded, load_mask
from garserve.inputs.mask_picture import picture_labels, picture_mask
from garserve.inputs.rle import decode_rle

Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]

# Coordinates may pass the image's edge by this much before it counts as a mistake: data sets round their boxes.
_EDGE_TOLERANCE = 1.0
# Pixels of a stroke that are looked at together: four float64 for each are held meanwhile.
_STROKE_BLOCK = 1 << 20


class Shape(Protocol):
    """A region's outline in pixels."""

    @property
    def kind(self) -> str:
        """What a user calls it."""

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""


@dataclass(frozen=True)
class MaskShape:
    """A mask of the image's size: what is not 0, or only where it has the value `value`."""

    source: Any
    value: float | None = None
    kind: ClassVar[str] = "mask"

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""
        mask = self.array()
        if mask.shape != (height, width):
            raise RegionError(
                f"{self.kind}: expected the image's size {width}x{height} (width x height), "
                f"got {mask.shape[1]}x{mask.shape[0]}"
            )
        return mask

    def array(self) -> Mask:
        """Return the mask bool [H, W] at its own size; RegionError where it is none."""
        if isinstance(self.source, str | os.PathLike | Image.Image):
            picture, path = self._picture()
            return picture_mask(picture, path) if self.value is None else picture_labels(picture) == self.value
        array = self._numbers()
        if self.value is not None:
            return np.asarray(array == self.value)
        return array if array.dtype == np.bool_ else array != 0

    def _picture(self) -> tuple[Image.Image, str | os.PathLike[str]]:
        """Return the decoded picture, and the path of its file; "" where that is not known."""
        if isinstance(self.source, Image.Image):
            return decoded(self.source), getattr(self.source, "filename", "")
        try:
            return load_mask(self.source), self.source
        except ImageError as error:
            raise RegionError(f"{self.kind}: {error}") from None

    def _numbers(self) -> NDArray[Any]:
        try:
            array = np.asarray(self.source)
        except ValueError:  # rows of different lengths
            raise RegionError(
                f"{self.kind}: expected numbers or booleans of shape [H, W], got {self.source!r:.80}"
            ) from None
        if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
            array = array.squeeze(0 if array.shape[0] == 1 else 2)
        if array.ndim != 2 or array.dtype.kind not in "biuf":
            raise RegionError(
                f"{self.kind}: expected numbers or booleans of shape [H, W], got {array.dtype} {list(array.shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RegionError(f"{self.kind}: holds NaN or infinite values")
        return array


def _check_pixels(kind: str, coordinates: Sequence[float]) -> None:
    """Check that coordinates are pixels; RegionError where all lie in 0..1 and not all are whole."""
    if min(coordinates) >= 0 and max(coordinates) <= 1 and any(number % 1 for number in coordinates):
        got = ", ".join(f"{number:g}" for number in coordinates[:8]) + (", ..." if len(coordinates) > 8 else "")
        raise RegionError(f"{kind}: expected pixels, got [{got}], which look like fractions")


@dataclass(frozen=True)
class BoxShape:
    """A box in pixels, x2 and y2 exclusive edges."""

    box: Box
    clip: bool
    kind: ClassVar[str] = "box"

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""
        x1, y1, x2, y2 = self.box
        if x2 <= x1 or y2 <= y1:
            raise RegionError(f"{self.kind}: expected x1 < x2 and y1 < y2, got {list(self.box)}")
        _check_pixels(self.kind, self.box)
        outside = x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0
        slack = 0 if outside else _EDGE_TOLERANCE
        beyond = x1 < -slack or y1 < -slack or x2 > width + slack or y2 > height + slack
        if outside or (beyond and not self.clip):
            hint = "" if outside else "; clip=True cuts it at the edge"
            raise RegionError(f"{self.kind}: {list(self.box)} lies outside the {width}x{height} image{hint}")
        mask = np.zeros((height, width), dtype=np.bool_)
        mask[max(math.floor(y1), 0) : math.ceil(y2), max(math.floor(x1), 0) : math.ceil(x2)] = True
        return mask


@dataclass(frozen=True)
class PolygonShape:
    """Polygons as flat lists of coordinates; drawn by COCO's rule."""

    polygons: tuple[tuple[float, ...], ...]
    kind: ClassVar[str] = "polygon"

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""
        _check_pixels(self.kind, [number for polygon in self.polygons for number in polygon])
        for polygon in self.polygons:
            xs, ys = polygon[::2], polygon[1::2]
            slack = _EDGE_TOLERANCE
            if min(xs) < -slack or min(ys) < -slack or max(xs) > width + slack or max(ys) > height + slack:
                raise RegionError(
                    f"{self.kind}: spans x {min(xs):g}..{max(xs):g}, y {min(ys):g}..{max(ys):g}, "
                    f"outside the {width}x{height} image"
                )
        encoded = [coco.frPyObjects([list(polygon)], height, width)[0] for polygon in self.polygons]
        while len(encoded) > 1:  # in pairs: COCO's code copies what it has for each further one, and lets nobody in
            encoded = [coco.merge(encoded[i : i + 2]) for i in range(0, len(encoded), 2)]
        return coco.decode(encoded[0]).astype(np.bool_)


@dataclass(frozen=True)
class RLEShape:
    """COCO run-length encoding."""

    rle: Any
    kind: ClassVar[str] = "rle"

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""
        return decode_rle(self.rle, height, width)


@dataclass(frozen=True)
class StrokeShape:
    """All pixels whose centre lies within `radius` of a point (or of the line through the points)."""

    points: tuple[tuple[float, float], ...]
    radius: float
    joined: bool

    @property
    def kind(self) -> str:
        """What a user calls it."""
        return "scribble" if self.joined else "points"

    def draw(self, height: int, width: int) -> Mask:
        """Draw on an image of this size; RegionError where it does not fit."""
        if not (math.isfinite(self.radius) and 0 < self.radius <= 10_000):
            raise RegionError(f"{self.kind}: expected a radius of more than 0 pixels, got {self.radius:g}")
        if len(self.points) > 1:  # one alone may be a click on the first pixel
            _check_pixels(self.kind, [number for point in self.points for number in point])
        mask = np.zeros((height, width), dtype=np.bool_)
        for x, y in self.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise RegionError(f"{self.kind}: [{x:g}, {y:g}] lies outside the {width}x{height} image")
            mask[min(int(y), height - 1), min(int(x), width - 1)] = True
        ends = self.points[1:] if self.joined else self.points
        for start, end in zip(self.points, ends, strict=False):
            self._stroke(mask, start, end)
        return mask

    def _stroke(self, mask: Mask, start: tuple[float, float], end: tuple[float, float]) -> None:
        reach, (height, width) = self.radius, mask.shape
        left, right = sorted((start[0], end[0]))
        top, bottom = sorted((start[1], end[1]))
        x0, x1 = max(math.floor(left - reach), 0), min(math.ceil(right + reach) + 1, width)
        y0, y1 = max(math.floor(top - reach), 0), min(math.ceil(bottom + reach) + 1, height)
        x = np.arange(x0, x1)[None, :] + 0.5 - start[0]
        dx, dy = end[0] - start[0], end[1] - start[1]
        rows = max(_STROKE_BLOCK // max(x1 - x0, 1), 1)
        for upper in range(y0, y1, rows):
            lower = min(upper + rows, y1)
            y = np.arange(upper, lower)[:, None] + 0.5 - start[1]
            along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0.0, 1.0)
            mask[upper:lower, x0:x1] |= (x - along * dx) ** 2 + (y - along * dy) ** 2 <= reach * reach
