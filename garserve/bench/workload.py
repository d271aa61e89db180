"""What is asked while measuring: photographs made of one that comes with garserve, and regions of random shapes.

The same arguments give the same requests. Real masks are in real.py.
"""

import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from garserve.bench.kinds import Kind
from garserve.errors import RequestError
from garserve.inputs.images import hold_image
from garserve.inputs.request import RegionRequest

DENSE = 20
PER_SEED = 1_000_000  # numbers of images that a seed has for itself: more images than anyone holds in memory
_FIVE, _QUESTIONS = 5, 10
_SHORTEST_SIDE, _LONGEST_SIDE = 2, 20_000
_DOWN, _ACROSS = 7, 13  # pixels by which each picture is shifted against the one before
_LIGHT_STEP = 32  # pixels between the points whose light is drawn
_SMALLEST, _LARGEST = 0.004, 0.15  # of the image, what a region covers


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are asked."""

    name: str
    requests: list[RegionRequest]
    images: int


def make_workload(
    kind: Kind,
    images: int,
    size: tuple[int, int],
    *,
    max_tokens: int,
    group: int = 1,
    first: int = 0,
    regions: int = DENSE,
) -> Workload:
    """Draw the requests of one kind over so many images of `size` (width, height), numbered from `first` on.

    A dense image has `regions` regions, of which `group` are asked about under one mask, each by itself, as
    `garserve batch --group` does.
    Raises RequestError where group is not 1 to 5, or not 1 with another kind.
    """
    if not 1 <= group <= _FIVE or (group > 1 and kind != "dense"):
        raise RequestError(f"group: expected 1 to {_FIVE}, more than 1 with dense only, got {group} with {kind}")
    requests: list[RegionRequest] = []
    for number in range(first, first + images):
        image = picture(number, size)
        count = regions if kind == "dense" else 1 if kind == "stream" else _FIVE
        masks = [region(number * 100 + i, size) for i in range(count)]
        requests += _asked(kind, image, masks, group, max_tokens)
    return Workload(kind, requests, images)


def parse_pair(option: str, text: str, least: int = 1) -> tuple[int, int]:
    """Read two whole numbers of at least `least` as in 640x480. Raises RequestError naming the option."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and least <= int(part) <= _LONGEST_SIDE for part in parts):
        raise RequestError(
            f"{option}: expected two whole numbers from {least} to {_LONGEST_SIDE} as in 640x480, got {text!r:.40}"
        )
    return int(parts[0]), int(parts[1])


def parse_size(text: str) -> tuple[int, int]:
    """Read --size as (width, height) in pixels. Raises RequestError, also for a side on which no region has room."""
    return parse_pair("--size", text, _SHORTEST_SIDE)


def picture(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a photograph [H, W, 3] that differs from those of other numbers in every tile.

    It is shifted by the number; from where the shifts come again, light of the number's own lies on it as well.
    """
    width, height = size
    with Image.open(str(files("garserve") / "data" / "coffee.jpg")) as photo:
        resized = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    shifted = np.roll(resized, (_DOWN * number % height, _ACROSS * number % width), axis=(0, 1))
    shifts = math.lcm(height // math.gcd(_DOWN, height), width // math.gcd(_ACROSS, width))
    return hold_image(shifted if number < shifts else _lit(shifted, number))


def _lit(pixels: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3] in a random light, so smooth that a thumbnail and a JPEG keep it."""
    height, width = pixels.shape[:2]
    shape = (height // _LIGHT_STEP + 2, width // _LIGHT_STEP + 2, 3)
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 32, shape, dtype=np.uint8))
    light = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return (pixels.astype(np.uint16) * 7 // 8 + light).astype(np.uint8)  # at most 223 + 31


def region(seed: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return an ellipse [H, W] somewhere inside the image, between 0.4 and 15 % of it."""
    width, height = size
    rng = np.random.default_rng(seed)
    area = np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST)))
    ratio = np.exp(rng.uniform(-0.7, 0.7))
    x_reach, y_reach = (max(np.sqrt(area * r / np.pi), 1 / min(size)) for r in (ratio, 1 / ratio))
    x, y = rng.uniform(x_reach, 1 - x_reach), rng.uniform(y_reach, 1 - y_reach)
    columns, rows = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return np.asarray(((columns - x) / x_reach)[None, :] ** 2 + ((rows - y) / y_reach)[:, None] ** 2 <= 1)


def _asked(kind: Kind, image: NDArray[np.uint8], masks: list[Any], group: int, max_tokens: int) -> list[RegionRequest]:
    if kind == "stream" or (kind == "dense" and group == 1):
        return [RegionRequest(image, [mask], max_tokens=max_tokens) for mask in masks]
    if kind == "dense":
        asked = []
        for start in range(0, len(masks), group):
            some = masks[start : start + group]
            for number in range(len(some)):
                text = f"Describe <Prompt{number}> in detail."
                asked.append(RegionRequest(image, some, text, focus=[number], max_tokens=max_tokens))
        return asked
    texts = [f"Where is <Prompt{i % 5}> relative to <Prompt{(i + 1 + i // 5) % 5}>?" for i in range(_QUESTIONS)]
    return [RegionRequest(image, masks, text, max_tokens=max_tokens) for text in texts[: 1 if kind == "five" else None]]
