"""Training pictures with regions: procedural scenes, and parts of photographs that come inside Python packages.

A Picture is an image uint8 [H, W, 3] and one to five masks bool [H, W]; the same seed gives the same picture.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from attributes import COLOURS, colour_terms, srgb_to_lab
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from shapes import (
    KINDS,
    grown_from_colour,
    inside_of,
    overlapping_with,
    random_area,
    random_shape,
)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
TRAINING_PHOTOS = (
    *(
        f"skimage/{name}.png"
        for name in ("astronaut", "chelsea", "motorcycle_left", "motorcycle_right", "ihc", "color")
    ),
    *(
        f"skimage/{name}.png"
        for name in ("brick", "camera", "cell", "coins", "grass", "gravel", "moon", "clock_motion")
    ),
    *("skimage/hubble_deep_field.jpg", "skimage/retina.jpg", "skimage/rocket.jpg"),
    *("sklearn/china.jpg", "matplotlib/grace_hopper.jpg"),
)
HELD_OUT_PHOTOS = ("skimage/coffee.png", "sklearn/flower.jpg")
# How often each is drawn: those with many things and colours more often.
_WEIGHTS = np.array([3, 3, 4, 4, 1.5, 1.5, 0.7, 1, 0.5, 0.7, 0.7, 0.7, 0.3, 0.5, 1, 0.7, 2, 4, 3], dtype=float)


@dataclass(frozen=True)
class Picture:
    """An image and the masks of its regions."""

    image: Pixels
    masks: list[Mask]


@cache
def photo(name: str) -> Pixels:
    """Read a photograph by package and file name, at most 700 pixels on a side, as RGB uint8 [H, W, 3]."""
    package, file = name.split("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"photographs: package {package} is missing; expected `pip install scikit-image scikit-learn matplotlib`"
        )
    with Image.open(Path(spec.origin).parent / _FOLDERS[package] / file) as opened:
        rgb = opened.convert("RGB")
        rgb.thumbnail((700, 700), Image.Resampling.LANCZOS)
        return np.asarray(rgb)


@cache
def _palette() -> list[NDArray[np.uint8]]:
    """Many colours of each term of COLOURS, evenly spread in sRGB."""
    rgb = np.random.default_rng(7).integers(0, 256, (60_000, 3)).astype(np.uint8)
    greys = np.clip(rgb[:12_000].mean(axis=1, keepdims=True) * 1.4 - 50 + (rgb[:12_000] - 127.5) * 0.06, 0, 255)
    rgb = np.concatenate([rgb, greys.astype(np.uint8)])
    terms = colour_terms(srgb_to_lab(rgb.astype(np.float64)))
    return [rgb[terms == index] for index in range(len(COLOURS))]


def random_colour(rng: Generator) -> NDArray[np.float64]:
    """Return an sRGB colour [3] of a random term."""
    choices = _palette()[rng.integers(len(COLOURS))]
    return choices[rng.integers(len(choices))].astype(np.float64)


def _frame(rng: Generator) -> tuple[int, int]:
    """Height and width of a picture: ratio 9:16 to 16:9, mostly 3:4 to 4:3."""
    ratio = np.exp(np.clip(rng.normal(0, 0.32), -0.57, 0.57))
    side = rng.uniform(130, 230)
    return round(side / np.sqrt(ratio)), round(side * np.sqrt(ratio))


def _pattern(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    """A pattern of -1..1, [height, width]: stripes, checks, dots, fine or coarse noise."""
    kind = rng.integers(5)
    period, turn = rng.uniform(5, 22), rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width]
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    if kind == 0:
        return np.sign(np.sin(u * 2 * np.pi / period))
    if kind == 1:
        return np.sign(np.sin(u * 2 * np.pi / period) * np.sin(v * 2 * np.pi / period))
    if kind == 2:
        return np.where(np.hypot(u % period - period / 2, v % period - period / 2) < period * 0.3, 1.0, -0.4)
    coarse = int(rng.integers(2, 7)) if kind == 3 else 1
    noise = rng.normal(0, 0.6, (height // coarse + 1, width // coarse + 1)).astype(np.float32)
    return np.clip(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), -1, 1)


def _paint(rng: Generator, height: int, width: int, *, textured: bool) -> NDArray[np.float64]:
    """One surface [height, width, 3]: a colour with a slight gradient, or with a pattern of the same colour."""
    base = random_colour(rng)
    surface = np.broadcast_to(base, (height, width, 3)).copy()
    if rng.random() < 0.4:
        slope = np.linspace(-1, 1, width)[None, :] * rng.normal(0, 10) + np.linspace(-1, 1, height)[
            :, None
        ] * rng.normal(0, 10)
        surface += slope[..., None]
    if textured:
        if rng.random() < 0.8:
            surface += _pattern(rng, height, width)[..., None] * rng.uniform(12, 45)
        else:
            mixed = (_pattern(rng, height, width)[..., None] + 1) / 2 * rng.uniform(0.3, 1)
            surface = surface * (1 - mixed) + random_colour(rng) * mixed
    return surface


@dataclass(frozen=True)
class Crowd:
    """How often a picture gets one to five regions, and how often one inside of or overlapping another besides."""

    counts: tuple[float, ...]
    pairs: float


HELD_OUT = Crowd((0.22, 0.38, 0.18, 0.12, 0.1), 0.25)
TAUGHT = Crowd((0.2, 0.34, 0.18, 0.16, 0.12), 0.45)  # more of what is hardest to tell: how two regions lie


def scene(rng: Generator, crowd: Crowd = HELD_OUT) -> Picture:
    """Draw a procedural scene: a background and two to nine shapes, some textured, some hiding others."""
    height, width = _frame(rng)
    if rng.random() < 0.15:
        image = _photo_part(rng, height, width, TRAINING_PHOTOS).astype(np.float64)
    else:
        image = _paint(rng, height, width, textured=rng.random() < 0.35)
    shown: list[Mask] = []
    whole = rng.random() < 0.25  # masks of hidden parts too
    for _ in range(int(rng.integers(2, 10))):
        mask = random_shape(rng, height, width, random_area(rng, 0.002, 0.35), KINDS[rng.integers(len(KINDS))])
        if shown and rng.random() < 0.15:
            mask = (inside_of if rng.random() < 0.6 else overlapping_with)(rng, shown[-1])
            if mask is None:
                continue
        surface = _paint(rng, height, width, textured=rng.random() < 0.35)
        image[mask] = surface[mask]
        if not whole:
            shown = [old & ~mask for old in shown]
        shown.append(mask)
    pixels = _camera(rng, image)
    usable = [mask for mask in shown if mask.sum() >= 25 and mask.mean() >= 0.0012]
    return _pick(rng, pixels, usable, crowd)


def photograph(
    rng: Generator, names: tuple[str, ...] = TRAINING_PHOTOS, *, natural: bool = False, crowd: Crowd = HELD_OUT
) -> Picture:
    """Take a part of a photograph and choose regions: grown along its colours, or any shapes.

    Colours are changed at random, unless `natural`.
    """
    height, width = _frame(rng)
    part = _photo_part(rng, height, width, names)
    pixels = part if natural else _camera(rng, _recolour(rng, part))
    smooth = cv2.GaussianBlur(pixels, (5, 5), 0)
    masks: list[Mask] = []
    share = rng.choice([0.0, 0.5, 1.0])
    for _ in range(int(rng.integers(2, 7))):
        grown = grown_from_colour(rng, pixels, smooth) if rng.random() < share else None
        masks.append(grown if grown is not None else random_shape(rng, height, width, random_area(rng)))
    return _pick(rng, pixels, [mask for mask in masks if mask.sum() >= 25 and mask.mean() >= 0.0012], crowd)


def picture(rng: Generator) -> Picture:
    """Return a scene or a part of a photograph to learn from."""
    return photograph(rng, crowd=TAUGHT) if rng.random() < 0.42 else scene(rng, TAUGHT)


def crowded(rng: Generator) -> Picture:
    """Return a picture to learn from with up to five regions, none over another: its own, and drawn ones."""
    made = picture(rng)
    height, width = made.image.shape[:2]
    drawn = (random_shape(rng, height, width, random_area(rng, 0.003, 0.2)) for _ in range(12))
    masks: list[Mask] = []
    for mask in (*made.masks[: rng.integers(len(made.masks) + 1)], *drawn):
        usable = mask.sum() >= 25 and mask.mean() >= 0.0012
        if len(masks) < 5 and usable and not any((mask & other).any() for other in masks):
            masks.append(mask)
    return Picture(made.image, [masks[i] for i in rng.permutation(len(masks))] or made.masks)


def _pick(rng: Generator, image: Pixels, masks: list[Mask], crowd: Crowd) -> Picture:
    """Choose one to five regions, and now and then add one inside of or overlapping another."""
    height, width = image.shape[:2]
    if not masks:
        masks = [random_shape(rng, height, width, 0.1, "circle")]
    order = rng.permutation(len(masks))[: rng.choice([1, 2, 3, 4, 5], p=crowd.counts)]
    chosen = [masks[index] for index in order]
    if len(chosen) < 5 and rng.random() < crowd.pairs:
        extra = (inside_of if rng.random() < 0.55 else overlapping_with)(rng, chosen[rng.integers(len(chosen))])
        if extra is not None and extra.sum() >= 25:
            chosen.insert(int(rng.integers(len(chosen) + 1)), extra)
    return Picture(image, chosen)


def _photo_part(rng: Generator, height: int, width: int, names: tuple[str, ...]) -> Pixels:
    weights = _WEIGHTS / _WEIGHTS.sum() if names is TRAINING_PHOTOS else None
    whole = photo(str(rng.choice(names, p=weights)))
    zoom = min(whole.shape[0] / height, whole.shape[1] / width) * rng.uniform(0.35, 1.0)
    rows, columns = int(height * zoom), int(width * zoom)
    top, left = int(rng.integers(whole.shape[0] - rows + 1)), int(rng.integers(whole.shape[1] - columns + 1))
    part = whole[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if rng.random() < 0.1:
        part = part[::-1]
    return cv2.resize(
        np.ascontiguousarray(part), (width, height), interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_CUBIC
    )


def _recolour(rng: Generator, image: Pixels) -> NDArray[np.float64]:
    """Turn hues, scale saturation, light and contrast, so that few photographs have many colours."""
    values = image.astype(np.float64)
    if rng.random() < 0.25:
        return values
    grey = values @ np.array([0.299, 0.587, 0.114])
    if rng.random() < 0.6:
        values = _turn_hue(values, grey, rng.uniform(-np.pi, np.pi))
    values = grey[..., None] + (values - grey[..., None]) * np.exp(rng.normal(0.1, 0.5))
    if rng.random() < 0.15:  # a tinted light, which gives grey photographs colour
        values = values * (random_colour(rng) / 128)
    if rng.random() < 0.5:
        values = 255 * np.clip(values / 255, 0, 1) ** np.exp(rng.normal(0, 0.35))
    return (values - 128) * np.exp(rng.normal(0, 0.2)) + 128 + rng.normal(0, 12)


def _turn_hue(values: NDArray[np.float64], grey: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    i = values @ np.array([0.596, -0.274, -0.322])
    q = values @ np.array([0.211, -0.523, 0.312])
    i, q = i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)
    return np.stack([grey + 0.956 * i + 0.621 * q, grey - 0.272 * i - 0.647 * q, grey - 1.106 * i + 1.703 * q], axis=-1)


def _camera(rng: Generator, image: NDArray[np.float64]) -> Pixels:
    """Blur a little, add a little noise, and round to uint8."""
    values = image.astype(np.float32)
    if rng.random() < 0.3:
        values = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(1, 6), values.shape).astype(np.float32)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
