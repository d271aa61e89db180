"""Random region masks of all kinds, bool [H, W], drawn with a numpy random generator."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
KINDS = ("ellipse", "circle", "rectangle", "square", "bar", "polygon", "star", "blob")


def random_area(rng: Generator, low: float = 0.002, high: float = 0.45) -> float:
    """Return a share of the image's area, evenly spread over its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def random_shape(rng: Generator, height: int, width: int, area: float, kind: str | None = None) -> Mask:
    """Draw one filled shape of about `area` (share of the image) somewhere, wholly inside where it fits."""
    kind = kind or KINDS[rng.integers(len(KINDS))]
    outline = _outline(rng, kind)
    turn = 0.0 if kind in ("rectangle", "square") and rng.random() < 0.5 else rng.uniform(0, 2 * np.pi)
    cosine, sine = np.cos(turn), np.sin(turn)
    outline = outline @ np.array([[cosine, -sine], [sine, cosine]])
    filled = abs(cv2.contourArea(outline.astype(np.float32)))
    outline *= np.sqrt(area * height * width / max(filled, 1e-6))
    outline -= outline.min(axis=0)
    extent = outline.max(axis=0)
    room = np.array([width, height]) - extent
    spill = 0.15 * extent
    low, high = (
        np.where(room > 0, -0.03 * extent, -spill),
        np.where(room > 0, room + 0.03 * extent, spill + np.minimum(room, 0)),
    )
    outline += rng.uniform(np.minimum(low, high), np.maximum(low, high))
    return fill(outline, height, width)


def fill(outline: NDArray[np.float64], height: int, width: int) -> Mask:
    """Fill a polygon [N, 2] of pixel coordinates."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round((outline - 0.5) * 16).astype(np.int32)], 1, shift=4)
    return canvas.astype(bool)


def _outline(rng: Generator, kind: str) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    if kind == "circle":
        return ring
    if kind == "ellipse":
        return ring * [1, rng.uniform(0.25, 1)]
    if kind == "square":
        return corners * [1, rng.uniform(0.85, 1)]
    if kind == "rectangle":
        return corners * [1, rng.uniform(0.25, 1)]
    if kind == "bar":
        return (corners if rng.random() < 0.6 else ring) * [1, rng.uniform(0.08, 0.33)]
    if kind == "polygon":
        count = int(rng.integers(3, 8))
        around = np.sort(rng.uniform(0, 2 * np.pi, count))
        return np.stack([np.cos(around), np.sin(around)], axis=1) * rng.uniform(0.6, 1, (count, 1))
    if kind == "star":
        count = int(rng.integers(4, 9))
        around = np.linspace(0, 2 * np.pi, 2 * count, endpoint=False)
        radius = np.where(np.arange(2 * count) % 2, rng.uniform(0.25, 0.6), 1.0)
        return np.stack([np.cos(around), np.sin(around)], axis=1) * radius[:, None]
    waves = sum(rng.normal(0, 0.35 / k) * np.sin(k * angle + rng.uniform(0, 6.28)) for k in range(2, 6))
    return ring * np.maximum(0.25, 1 + np.asarray(waves))[:, None]


def inside_of(rng: Generator, mask: Mask) -> Mask | None:
    """Draw a smaller shape within a region, or None where none was found."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    for _ in range(6):
        area = float(mask.mean()) * rng.uniform(0.05, 0.4)
        kind = KINDS[rng.integers(len(KINDS))]
        drawn = random_shape(rng, height, width, area, kind) & mask
        pick = rng.integers(len(rows))
        small = random_shape(rng, height, width, area, kind)
        ys, xs = np.nonzero(small)
        if len(ys) == 0:
            continue
        moved = np.roll(small, (int(rows[pick] - ys.mean()), int(columns[pick] - xs.mean())), axis=(0, 1))
        for candidate in (moved, drawn):
            inner = candidate & mask
            if inner.sum() > 12 and inner.sum() >= 0.7 * candidate.sum():
                return inner
    return None


def overlapping_with(rng: Generator, mask: Mask) -> Mask | None:
    """Draw a shape that shares about half of itself with a region, or None where none was found."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    for _ in range(6):
        other = random_shape(rng, height, width, float(mask.mean()) * rng.uniform(0.4, 2.0))
        ys, xs = np.nonzero(other)
        if len(ys) == 0:
            continue
        edge = rng.integers(len(rows))
        side = rng.integers(len(ys))
        dy, dx = int(rows[edge] - ys[side]), int(columns[edge] - xs[side])
        moved = cv2.warpAffine(other.astype(np.uint8), np.float32([[1, 0, dx], [0, 1, dy]]), (width, height)) > 0
        share = (moved & mask).sum() / max(1, min(moved.sum(), mask.sum()))
        if 0.25 <= share <= 0.75:
            return moved
    return None


def grown_from_colour(rng: Generator, image: NDArray[np.uint8], smooth: NDArray[np.uint8]) -> Mask | None:
    """Grow a region of like colour from a random pixel of an image (`smooth`: the same, blurred); None where it fails.

    Gives contours that follow what is in a photograph.
    """
    height, width = image.shape[:2]
    seed = (int(rng.integers(width)), int(rng.integers(height)))
    tolerance = (int(rng.integers(6, 40)),) * 3
    flooded = np.zeros((height + 2, width + 2), np.uint8)
    flags = 4 | (255 << 8) | cv2.FLOODFILL_MASK_ONLY | (cv2.FLOODFILL_FIXED_RANGE if rng.random() < 0.8 else 0)
    if not flags & cv2.FLOODFILL_FIXED_RANGE:
        tolerance = (int(rng.integers(1, 5)),) * 3
    cv2.floodFill(smooth.copy(), flooded, seed, 0, tolerance, tolerance, flags)
    grown = (flooded[1:-1, 1:-1] > 0).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    grown = cv2.morphologyEx(cv2.morphologyEx(grown, cv2.MORPH_CLOSE, kernel, iterations=2), cv2.MORPH_OPEN, kernel)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(grown)
    if count < 2:
        return None
    part = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    mask = parts == part
    return mask if 0.0015 <= mask.mean() <= 0.6 else None
