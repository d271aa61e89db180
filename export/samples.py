"""Tiles to try exports on: random ones, and those of a photograph."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from garserve.config import GARConfig
from garserve.errors import ImageError
from garserve.inputs.images import load_image
from garserve.inputs.tiles import pack_mask, tile_image, tile_mask
from garserve.model.encoder import RegionEncoder

PHOTO = Path(str(files("garserve") / "data" / "coffee.jpg"))
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LEAST_TILES = 4  # a checkpoint of one tile an image is tried on more of them all the same


@dataclass(frozen=True)
class Tiles:
    """Tiles with their masks, as the exported graph takes them."""

    tiles: torch.Tensor  # uint8 [T, 3, S, S]
    masks: torch.Tensor  # uint8 [T, S, S], 0 and 1

    def features(self, encoder: RegionEncoder) -> torch.Tensor:
        """Compute the tiles with the reference: [T, n², C]."""
        with torch.inference_mode():
            return encoder.features(self.tiles, pack_mask(self.masks.bool()))

    def first(self, count: int) -> "Tiles":
        """Return the first `count` tiles."""
        return Tiles(self.tiles[:count], self.masks[:count])


def random_tiles(config: GARConfig, count: int, seed: int = 0) -> Tiles:
    """Draw noise, every other tile with a noisy mask over a rectangle; the others are unmarked."""
    generator = torch.Generator().manual_seed(seed)
    side = config.tile_size
    tiles = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    masks = (torch.rand(count, side, side, generator=generator) < 0.8).to(torch.uint8)
    masks[:, : side // 4] = 0
    masks[1::2] = 0
    return Tiles(tiles, masks)


def photo_tiles(config: GARConfig, images: Iterable[Path] = (PHOTO,)) -> Iterator[Tiles]:
    """Cut photographs into tiles as a request would, an ellipse at their centre marked. Raises ImageError."""
    most = max(config.max_num_tiles, _LEAST_TILES)
    for path in images:
        pixels = load_image(path)
        y, x = np.ogrid[-1 : 1 : pixels.shape[0] * 1j, -1 : 1 : pixels.shape[1] * 1j]
        cut = tile_image(pixels, most, config.tile_size)
        masks = tile_mask(x**2 + y**2 < 0.3, cut.grid, config.tile_size)
        yield Tiles(cut.tiles, masks.to(torch.uint8))


def image_files(given: Iterable[Path]) -> list[Path]:
    """Return files as they are, and the images of folders in the order of their names. Raises ImageError."""
    found: list[Path] = []
    for path in given:
        inside = sorted(one for one in path.iterdir() if one.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ImageError(f"{path}: expected a folder with images ({', '.join(_SUFFIXES)}), got none")
        found += inside
    return found


def relative_error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference over the largest wanted value; infinite where shapes differ."""
    if ours.shape != wanted.shape:
        return float("inf")
    return float((ours.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-12))
