"""Refinement without a model: GrabCut (Rother, Kolmogorov and Blake, 2004) by OpenCV, on a small copy of the image."""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from garserve.errors import RequestError
from garserve.inputs.regions import Region
from garserve.inputs.shapes import Mask, StrokeShape

_SIDE = 400  # pixels of the longer side of what is segmented: bounds the time, whatever the image
_ITERATIONS = 5
_CONTEXT = 0.5  # how much around a drawn outline is looked at, as a share of its larger side
_REACH = 3  # how many radii around a point or a stroke probably belong to the object
_LEAST = 0.02  # a result of less than this share of what was drawn is taken for a failure


class GrabCut:
    """Finds the object in a box or an outline, or the one that points or a scribble lie on."""

    def __init__(self) -> None:
        _opencv()

    def refine(self, image: NDArray[np.uint8], region: Region) -> Mask:
        """Return the object's mask [H, W] of an RGB image [H, W, 3]; where none is found, the region as drawn."""
        cv2 = _opencv()
        drawn = region.mask(*image.shape[:2])
        seeded = isinstance(region.shape, StrokeShape)
        top, bottom, left, right = _window(drawn, seeded)
        crop, marks = image[top:bottom, left:right], drawn[top:bottom, left:right]
        scale = min(1.0, _SIDE / max(marks.shape))
        size = (max(round(marks.shape[1] * scale), 1), max(round(marks.shape[0] * scale), 1))
        small = cv2.resize(np.ascontiguousarray(crop), size, interpolation=cv2.INTER_AREA)
        inside = cv2.resize(marks.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.25
        radius = region.shape.radius * scale if isinstance(region.shape, StrokeShape) else 0.0
        trimap = _seeds(cv2, inside, radius) if seeded else _outline(cv2, inside)
        found = _segmented(cv2, small, trimap)
        kept = _touching(cv2, found, inside) if seeded else _parts(cv2, found)
        shape = (marks.shape[1], marks.shape[0])
        large = cv2.resize(kept.astype(np.float32), shape, interpolation=cv2.INTER_LINEAR) > 0.5
        mask = np.zeros_like(drawn)
        mask[top:bottom, left:right] = large if seeded else large & _grown(cv2, marks)
        return mask if mask.sum() >= max(_LEAST * drawn.sum(), 1) else drawn


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError:
        raise RequestError("refine: needs OpenCV (pip install opencv-python-headless)") from None
    return cv2


def _window(drawn: Mask, seeded: bool) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of what is looked at: all of it for points, which say nothing of a size."""
    height, width = drawn.shape
    if seeded:
        return 0, height, 0, width
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    margin = int(_CONTEXT * max(rows[-1] - rows[0], columns[-1] - columns[0])) + 8
    return (
        max(int(rows[0]) - margin, 0),
        min(int(rows[-1]) + 1 + margin, height),
        max(int(columns[0]) - margin, 0),
        min(int(columns[-1]) + 1 + margin, width),
    )


def _outline(cv2: Any, inside: Mask) -> NDArray[np.uint8]:
    """Outside is background; inside, the object is to be found."""
    trimap = np.full(inside.shape, cv2.GC_BGD, np.uint8)
    trimap[inside] = cv2.GC_PR_FGD
    if inside.all():  # nothing is known to be background: the border has to stand for it
        trimap[[0, -1], :] = cv2.GC_BGD
        trimap[:, [0, -1]] = cv2.GC_BGD
    return trimap


def _seeds(cv2: Any, inside: Mask, radius: float) -> NDArray[np.uint8]:
    """What was marked is object, what lies near probably is, and all else probably is not."""
    trimap = np.full(inside.shape, cv2.GC_PR_BGD, np.uint8)
    distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 5)
    trimap[distance <= max((_REACH - 1) * radius, 2)] = cv2.GC_PR_FGD
    trimap[[0, -1], :] = cv2.GC_BGD
    trimap[:, [0, -1]] = cv2.GC_BGD
    trimap[inside] = cv2.GC_FGD
    return trimap


def _segmented(cv2: Any, image: NDArray[np.uint8], trimap: NDArray[np.uint8]) -> Mask:
    object_like = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
    if object_like.all() or not object_like.any():
        return object_like
    cv2.setRNGSeed(0)  # of this thread: the same request gives the same mask
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(image[..., ::-1])
    try:
        cv2.grabCut(bgr, trimap, None, background, foreground, _ITERATIONS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # one colour everywhere, or fewer pixels than its colour models have parts
        return object_like
    return (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)


def _touching(cv2: Any, found: Mask, seeds: Mask) -> Mask:
    """Only the connected parts that the marks lie on, their holes filled."""
    _, labels = cv2.connectedComponents(found.astype(np.uint8), connectivity=4)
    return _filled(cv2, np.isin(labels, np.setdiff1d(labels[seeds], [0])))


def _parts(cv2: Any, found: Mask) -> Mask:
    """Without specks: parts of less than a tenth of the largest one are no part of an object."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found.astype(np.uint8), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return _filled(cv2, (areas >= max(areas.max() / 10, 1))[labels])


def _filled(cv2: Any, mask: Mask) -> Mask:
    outer, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros(mask.shape, np.uint8), outer, -1, 1, cv2.FILLED) > 0)


def _grown(cv2: Any, marks: Mask) -> Mask:
    """What was drawn and a pixel around it: scaling back may not lead far out of it."""
    return np.asarray(cv2.dilate(marks.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
