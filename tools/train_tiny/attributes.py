"""What can truly be said of a region, computed from pixels and mask alone: the ground truth of the tiny checkpoint.

Every label is a word, or None where the definition gives no clear answer; nothing is asked or scored there (a
description uses the nearest word, see `nominal_size`). Images are uint8 RGB [H, W, 3]; masks are bool [H, W] with at
least one pixel. Fractions are of the image's width, height or area: stretching a picture changes no size or position.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]

COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("tiny", "small", "medium", "large")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SHAPES = ("round", "square", "elongated", "irregular")
TEXTURES = ("plain", "textured")
RELATIONS = ("left of", "right of", "above", "below", "inside", "around", "overlapping")

# Where a colour is looked at for its name: itself and four corners around it, in L*, a*, b*.
LOOKS = np.array([[0.0, 0, 0], [3, 3, 3], [3, -3, -3], [-3, 3, -3], [-3, -3, 3]])
CELLS = 128  # colour and texture are judged on at most this many rows and columns of averaged pixels
SIZE_LIMITS = (0.01, 0.05, 0.20)  # areas that part the four sizes
SIZE_MARGIN = 1.15  # an area within this factor of a limit is unclear
POSITION_MARGIN = 0.02  # a centre this near to a third of the image is unclear
LARGER_RATIO = 1.4  # areas nearer than this are neither larger nor smaller
_EQUAL = 1e-9  # shares of votes nearer than this are equal


@dataclass(frozen=True)
class RegionLabels:
    """What is clear of one region; None where it is not."""

    colour: str | None
    size: str | None
    position: str | None
    shape: str | None
    texture: str | None


def labels(image: Image, mask: Mask) -> RegionLabels:
    """Return all labels of one region."""
    cells = averaged_cells(image, mask)
    return RegionLabels(_clear_colour(cells), size(mask), position(mask), shape(mask), _clear_texture(cells))


# -- colour ------------------------------------------------------------------------------------------------------


def colour(image: Image, mask: Mask) -> str | None:
    """Return the region's dominant colour, one of COLOURS.

    The image is parted into at most CELLS x CELLS cells, and the masked pixels of each are averaged. Each cell gives
    as many votes as it has masked pixels: a fifth to the term of its colour (`colour_terms`), and a fifth to that of
    each of four colours beside it (LOOKS), so that a colour between two terms votes for both. Clear where the first
    term has at least half of the votes and more than one and a half times the second's: not where every cell of a
    plain colour votes three to two.
    """
    return _clear_colour(averaged_cells(image, mask))


def colour_shares(image: Image, mask: Mask) -> NDArray[np.float64]:
    """Return the share of the region's votes that each of COLOURS has, [11], summing to 1."""
    return _shares(averaged_cells(image, mask))


def colour_terms(lab: NDArray[np.float64]) -> NDArray[np.int64]:
    """Name CIELAB colours [..., 3] (D65, L* 0..100): indices into COLOURS, [...].

    Little chroma is black, grey or white by lightness. The rest is parted by hue angle; within a hue, light reds are
    pink, dull or dark oranges brown, pale ones white, and blue reaches as far as lavender.
    """
    light, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
    chroma = np.hypot(a, b)
    hue = np.degrees(np.arctan2(b, a)) % 360

    def within(low: float, high: float) -> NDArray[np.bool_]:
        return (hue >= low) & (hue < high)

    rosy = within(335, 360) | within(0, 20)
    rules: list[tuple[str, NDArray[np.bool_]]] = [
        ("black", ((light < 25) & (chroma < 12)) | ((light < 12) & (chroma < 25)) | (light < 9)),
        ("white", ((light > 82) & (chroma < 12)) | ((light > 88) & (chroma < 18))),
        ("grey", chroma < 12),
        ("pink", (rosy & (light >= 58)) | (within(335, 360) & (light >= 50))),
        ("pink", (within(20, 44) & (light >= 72)) | (within(311, 335) & (light >= 72))),
        ("purple", within(311, 335) | within(335, 350)),
        ("brown", within(20, 44) & (chroma < 38)),
        ("red", within(350, 360) | within(0, 44)),
        ("orange", within(44, 80) & (light >= 55) & (chroma >= 45)),
        ("yellow", within(80, 112) & (light >= 50) & ((chroma >= 25) | (light >= 82))),
        ("white", within(44, 80) & (light >= 82) & (chroma < 30)),
        ("orange", within(44, 80) & (light >= 82)),
        ("brown", within(44, 97)),
        ("green", within(97, 195)),
        ("blue", within(195, 311)),
    ]
    return np.select([rule for _, rule in rules], [COLOURS.index(name) for name, _ in rules]).astype(np.int64)


def srgb_to_lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB of 0..255 [..., 3] to CIELAB with white point D65."""
    values = rgb / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@dataclass(frozen=True)
class Cells:
    """A region averaged to cells: colours in CIELAB, and how many of each cell's pixels are in the region."""

    lab: NDArray[np.float64]  # [h, w, 3]
    cover: NDArray[np.float64]  # [h, w], 0..1


def averaged_cells(image: Image, mask: Mask) -> Cells:
    """Part an image into at most CELLS x CELLS equal cells and average the masked pixels of each; cut to the region."""
    size = (min(mask.shape[1], CELLS), min(mask.shape[0], CELLS))
    inside = mask.astype(np.float32)
    cover = cv2.resize(inside, size, interpolation=cv2.INTER_AREA).astype(np.float64)
    total = cv2.resize(image.astype(np.float32) * inside[..., None], size, interpolation=cv2.INTER_AREA)
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cover, total = cover[part], total[part].astype(np.float64)
    return Cells(srgb_to_lab(np.clip(total / np.maximum(cover, 1e-6)[..., None], 0, 255)), cover)


def _shares(cells: Cells) -> NDArray[np.float64]:
    inside = cells.cover > 0
    lab, cover = cells.lab[inside], cells.cover[inside]
    terms = colour_terms(lab[:, None] + LOOKS)  # [cells, looks]
    votes = np.bincount(terms.ravel(), weights=np.repeat(cover, len(LOOKS)), minlength=len(COLOURS))
    return votes / votes.sum()


def _clear_colour(cells: Cells) -> str | None:
    shares = _shares(cells)
    second, first = np.sort(shares)[-2:]
    clear = first >= 0.5 - _EQUAL and first > 1.5 * second + _EQUAL
    return COLOURS[int(shares.argmax())] if clear else None


# -- texture -----------------------------------------------------------------------------------------------------


def texture(image: Image, mask: Mask) -> str | None:
    """Return "plain" or "textured", by the mean difference of lightness L* between neighbouring cells of the region.

    At most 1.5 is plain, at least 4 textured; with fewer than 12 pairs of cells of which more than nine
    tenths are the region's, nothing is clear.
    """
    return _clear_texture(averaged_cells(image, mask))


def _clear_texture(cells: Cells) -> str | None:
    whole, light = cells.cover > 0.9, cells.lab[..., 0]
    across, down = whole[:, 1:] & whole[:, :-1], whole[1:] & whole[:-1]
    steps = np.concatenate([np.abs(np.diff(light, axis=1))[across], np.abs(np.diff(light, axis=0))[down]])
    if len(steps) < 12:
        return None
    mean = float(steps.mean())
    return "plain" if mean <= 1.5 else "textured" if mean >= 4 else None


# -- size, position, shape ---------------------------------------------------------------------------------------


def size(mask: Mask) -> str | None:
    """Return one of SIZES by the share of the image's area: limits at 1, 5 and 20 %.

    Unclear within a factor of 1.15 of a limit.
    """
    area = float(mask.mean())
    if any(limit / SIZE_MARGIN < area < limit * SIZE_MARGIN for limit in SIZE_LIMITS):
        return None
    return nominal_size(mask)


def nominal_size(mask: Mask) -> str:
    """Return one of SIZES even near a limit."""
    return SIZES[int(np.searchsorted(SIZE_LIMITS, float(mask.mean())))]


def position(mask: Mask) -> str | None:
    """Return one of POSITIONS: in which ninth of the image the centre of the region's box lies.

    Unclear where that centre is within 2 % of the image's side of a third.
    """
    if any(abs(place - third) < POSITION_MARGIN for place in centre(mask) for third in (1 / 3, 2 / 3)):
        return None
    return nominal_position(mask)


def nominal_position(mask: Mask) -> str:
    """Return one of POSITIONS even near a third."""
    x, y = centre(mask)
    return POSITIONS[3 * min(int(y * 3), 2) + min(int(x * 3), 2)]


def box(mask: Mask) -> Box:
    """Return the region's box (x1, y1, x2, y2) as fractions of the image's width and height."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


def centre(mask: Mask) -> tuple[float, float]:
    """Return the centre (x, y) of the region's box, as fractions of the image's width and height."""
    x1, y1, x2, y2 = box(mask)
    return ((x1 + x2) / 2, (y1 + y2) / 2)


def shape(mask: Mask) -> str | None:
    """Return one of SHAPES, in the image's own pixels, for regions of at least 1 % of its area and 150 pixels.

    Irregular: at most 3/4 of its convex hull. Elongated: at least 4/5 of it, and at least 2.6 times as long as wide (by
    second moments). Round: not longer than 1.3 times its width, and what only the region or only the ellipse of its
    moments covers is at most 7 % of its area. Square: likewise not long, and filling at least 93 % of the smallest
    rectangle around it. Otherwise unclear.
    """
    area = int(mask.sum())
    if area < 150 or mask.mean() < 0.01:
        return None
    pixels = mask.astype(np.uint8)
    hull = _hull(pixels)
    solidity = area / cv2.contourArea(hull)
    if solidity <= 0.75:
        return "irregular"
    moments = cv2.moments(pixels, binaryImage=True)
    spread = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]]) / area + np.eye(2) / 12
    minor, major = np.sqrt(np.linalg.eigvalsh(spread))
    if major / minor >= 2.6 and solidity >= 0.8:
        return "elongated"
    if major / minor > 1.3:
        return None
    sides = cv2.minAreaRect(hull)[1]
    if area / (sides[0] * sides[1]) >= 0.93:
        return "square"
    rows, columns = np.nonzero(mask)
    x, y = columns - moments["m10"] / area, rows - moments["m01"] / area
    (xx, xy), (_, yy) = np.linalg.inv(spread)
    in_ellipse = int((xx * x * x + 2 * xy * x * y + yy * y * y <= 4).sum())
    ellipse = 4 * np.pi * float(np.sqrt(np.linalg.det(spread)))  # its area; a hole in the region makes it the larger
    return "round" if area + ellipse - 2 * in_ellipse <= 0.07 * area else None


def _hull(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the convex hull [N, 1, 2] of the outer corners of all pixels that are not 0."""
    outlines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = np.concatenate(outlines)[:, 0]
    steps = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    return cv2.convexHull((points[:, None] + steps).reshape(-1, 2).astype(np.float32))


# -- two regions -------------------------------------------------------------------------------------------------


def relation(a: Mask, b: Mask) -> str | None:
    """Return how region `a` lies to region `b`, one of RELATIONS.

    Inside: 90 % of a's pixels are b's, and b is larger by LARGER_RATIO; around is the reverse. Overlapping: 25 to 75 %
    of the smaller one's pixels are shared. A direction: less than 5 % are shared and the boxes share at most a quarter
    of the smaller one; the axis is the one along which the centres are at least 1.5 times as far apart, and they are
    at least 5 % of the image apart.
    """
    common, area_a, area_b = int((a & b).sum()), int(a.sum()), int(b.sum())
    if common >= 0.9 * area_a and area_b >= LARGER_RATIO * area_a:
        return "inside"
    if common >= 0.9 * area_b and area_a >= LARGER_RATIO * area_b:
        return "around"
    shared = common / min(area_a, area_b)
    if 0.25 <= shared <= 0.75:
        return "overlapping"
    if shared >= 0.05 or _box_share(box(a), box(b)) > 0.25:
        return None
    (ax, ay), (bx, by) = centre(a), centre(b)
    dx, dy = ax - bx, ay - by
    if max(abs(dx), abs(dy)) < 0.05:
        return None
    if abs(dx) >= 1.5 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _box_share(a: Box, b: Box) -> float:
    """Return which part of the smaller box lies in the other."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return across * down / smaller


def larger(a: Mask, b: Mask) -> bool | None:
    """Return whether region `a` has more pixels than `b`; None where the areas are within a factor of 1.4."""
    area_a, area_b = int(a.sum()), int(b.sum())
    if max(area_a, area_b) < LARGER_RATIO * min(area_a, area_b):
        return None
    return area_a > area_b


def same_colour(image: Image, a: Mask, b: Mask) -> bool | None:
    """Return whether both regions have the same dominant colour; None where either one is unclear."""
    first, second = colour(image, a), colour(image, b)
    return None if first is None or second is None else first == second
