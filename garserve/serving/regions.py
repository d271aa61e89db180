"""Regions from clients: the forms of Region.parse with nothing of the server's files, and bounds on what they cost."""

import math
from collections.abc import Sequence
from typing import Any

from garserve.errors import ImageError, InputError, RegionError
from garserve.inputs.images import load_mask
from garserve.inputs.regions import Region
from garserve.inputs.shapes import PolygonShape, StrokeShape

_RUNS_PER_POINT = 32
_STROKE_WORK = 200_000_000  # pixels looked at to draw one region of points or a scribble: about four seconds
_OUTLINE = 1_000_000  # pixels of a polygon's outline; COCO's code keeps 5 positions for each
_PNG = "data:image/png;base64,"


def parse_regions(given: Sequence[Any], max_points: int) -> list[Region | str]:
    """Return regions as Region objects; a mask stays the data URL that it is until the image's size is known.

    Raises RegionError naming the region and the field, before anything is drawn.
    """
    regions: list[Region | str] = []
    for position, region in enumerate(given):
        try:
            regions.append(_parse(region, max_points))
        except InputError as error:
            raise type(error)(f"regions[{position}]: {error}") from None
    return regions


def _parse(region: Any, max_points: int) -> Region | str:
    if not isinstance(region, dict):
        raise RegionError(f"expected an object such as {{'box': [x1, y1, x2, y2]}}, got {type(region).__name__}")
    if "mask" in region:
        mask = region["mask"]
        if set(region) != {"mask"} or not isinstance(mask, str) or not mask.startswith(_PNG):
            raise RegionError(f"mask: expected a PNG as {_PNG}…, and nothing beside it")
        return mask
    _check_counts(region, max_points)
    return Region.parse(region)


def _check_counts(region: dict[str, Any], max_points: int) -> None:
    for kind in ("polygon", "points", "scribble", "box", "xywh"):
        if kind in region and (count := _leaves(region[kind], 2 * max_points)) > 2 * max_points:
            raise RegionError(f"{kind}: at most {max_points} points are taken, got {count // 2} or more")
    rle = region.get("rle", region)
    counts = rle.get("counts") if isinstance(rle, dict) else None
    most = _RUNS_PER_POINT * max_points
    if isinstance(counts, str | list) and len(counts) > most:
        what = "characters" if isinstance(counts, str) else "runs"
        raise RegionError(f"rle: counts: at most {most} {what} are taken, got {len(counts)}")


def _leaves(value: Any, most: int, depth: int = 0) -> int:
    """Count the numbers of nested lists, as far as `most`; lists count, too, so that empty ones end."""
    if not isinstance(value, list):
        return 1
    if depth > 3:
        raise RegionError("polygon: expected lists of points, nested no deeper than a list of polygons")
    if len(value) > most:
        return len(value)
    count = 0
    for part in value:
        count += max(_leaves(part, most, depth + 1), 1)
        if count > most:
            break
    return count


def drawable(region: Region | str, height: int, width: int) -> Region:
    """Return a region that can be drawn on an image of this size in bounded time and memory.

    Raises RegionError where it would cost too much, or its mask is no PNG of at most this many pixels.
    """
    if isinstance(region, str):
        try:
            return Region.from_mask(load_mask(region, max_pixels=height * width))
        except ImageError as error:
            raise RegionError(f"mask: {error}") from None
    shape = region.shape
    if isinstance(shape, StrokeShape) and _stroke_work(shape, height, width) > _STROKE_WORK:
        raise RegionError(f"{shape.kind}: too many points for so large a radius")
    if isinstance(shape, PolygonShape) and _outline(shape) > _OUTLINE:
        raise RegionError(f"polygon: its outline is longer than {_OUTLINE} pixels")
    return region


def _stroke_work(shape: StrokeShape, height: int, width: int) -> float:
    ends = shape.points[1:] if shape.joined else shape.points
    work = 0.0
    for (x1, y1), (x2, y2) in zip(shape.points, ends, strict=False):
        reach = 2 * shape.radius if math.isfinite(shape.radius) else math.inf
        work += min(abs(x2 - x1) + reach + 2, width) * min(abs(y2 - y1) + reach + 2, height)
    return work


def _outline(shape: PolygonShape) -> float:
    length = 0.0
    for ring in shape.polygons:
        xs, ys = ring[::2], ring[1::2]
        for i in range(len(xs)):
            length += max(abs(xs[i] - xs[i - 1]), abs(ys[i] - ys[i - 1]))
    return length
