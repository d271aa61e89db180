"""Cutting images and masks into the tiles that GAR's tower reads, on torch alone.

The rules are those of Perception-LM's image processor as the authors run it (thumbnail first, then row by row).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Grid = tuple[int, int]  # tiles across, tiles down


@dataclass(frozen=True)
class TiledImage:
    """An image as tiles: uint8 [1 + across*down, 3, S, S], the thumbnail first."""

    tiles: torch.Tensor
    grid: Grid
    height: int
    width: int


@lru_cache(maxsize=64)
def _canvases(max_tiles: int) -> tuple[Grid, ...]:
    """All canvases (across, down) of at most `max_tiles` tiles, in the order in which ties are broken.

    Counts run from large to small; canvases of one ratio stand together at the place of the first.
    """
    groups: dict[float, list[Grid]] = {}
    for count in range(max_tiles, 0, -1):
        for across in range(1, count + 1):
            if count % across == 0:
                groups.setdefault(across / (count // across), []).append((across, count // across))
    return tuple(canvas for group in groups.values() for canvas in group)


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> Grid:
    """Choose how many tiles across and down an image of width x height pixels gets, at most `max_tiles` in all.

    Of the canvases that hold the image without reduction: the one in which the image, fitted with its aspect kept,
    is largest. If none holds it: the canvas of the nearest ratio on the safe side. `max_tiles` is 1 to 36.
    """
    if not 1 <= max_tiles <= 36:
        raise ValueError(f"max_tiles: expected 1 to 36, got {max_tiles}")
    if max_tiles == 1:
        return (1, 1)
    ratio = width / height
    holding = [(a, d) for a, d in _canvases(max_tiles) if tile_size * a >= width and tile_size * d >= height]
    if not holding:
        return _nearest_ratio(ratio, max_tiles)
    best, best_size = holding[0], -1
    for across, down in holding:
        size = _fitted_size(width, height, tile_size * across, tile_size * down)
        if size >= best_size:  # on a tie the later canvas
            best, best_size = (across, down), size
    return best


def _fitted_size(width: int, height: int, canvas_width: int, canvas_height: int) -> int:
    """The fitted side by which upstream compares: the height of wide images, the width of tall ones."""
    factor = min(canvas_width / width, canvas_height / height)
    ratio = width / height
    if width > height:
        return int(factor * width / ratio)
    return int(factor * height * ratio) if width < height else int(factor * height)


def _nearest_ratio(ratio: float, max_tiles: int) -> Grid:
    canvases = _canvases(max_tiles)
    ratios = {across / down for across, down in canvases}
    if ratio >= 1:
        nearest = max(r for r in ratios if r <= ratio)
        return max((c for c in canvases if c[0] / c[1] == nearest), key=lambda c: c[0])
    above = [r for r in ratios if r > ratio]
    nearest = min(above, key=lambda r: abs(1 / r - 1 / ratio))
    return max((c for c in canvases if c[0] / c[1] == nearest), key=lambda c: c[1])


def resize_bicubic(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [3, H, W] to [3, height, width] by antialiased bicubic (a = -0.5) in float32, rounded to uint8."""
    resized = functional.interpolate(
        image[None].float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].clamp_(0, 255).round_().to(torch.uint8)


def _split(canvas: torch.Tensor, grid: Grid, size: int) -> torch.Tensor:
    """Cut [K, down*S, across*S] into [down*across, K, S, S], row by row."""
    across, down = grid
    cut = canvas.reshape(-1, down, size, across, size)
    return cut.permute(1, 3, 0, 2, 4).reshape(down * across, -1, size, size)


def tile_image(image: NDArray[np.uint8], max_tiles: int, tile_size: int) -> TiledImage:
    """Cut an RGB uint8 image [H, W, 3] into tiles, stretched to the whole canvas (aspect not kept, no padding)."""
    height, width = image.shape[:2]
    grid = choose_grid(width, height, max_tiles, tile_size)
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    thumbnail = resize_bicubic(pixels, tile_size, tile_size)[None]
    canvas = resize_bicubic(pixels, grid[1] * tile_size, grid[0] * tile_size)
    tiles = torch.cat([thumbnail, _split(canvas, grid, tile_size)])
    return TiledImage(tiles.contiguous(), grid, height, width)


def _nearest_index(out_size: int, in_size: int) -> NDArray[np.int64]:
    """Source index of each output index, all in float32 as upstream computes it (float64 picks other pixels)."""
    scale = np.float32(in_size) / np.float32(out_size)
    index = np.floor(np.arange(out_size, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(index, in_size - 1)


def _pick_nearest(ids: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    rows, columns = _nearest_index(height, ids.shape[0]), _nearest_index(width, ids.shape[1])
    return ids[rows].take(columns, axis=1)


def resize_nearest(ids: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize [H, W] of any dtype to [height, width], each output taking one source pixel."""
    return torch.from_numpy(_pick_nearest(ids.numpy(), height, width))


def tile_mask(mask: NDArray[np.bool_], grid: Grid, tile_size: int) -> torch.Tensor:
    """Cut a boolean mask [H, W] like its image: bool [1 + across*down, S, S], the thumbnail's first.

    By numpy: torch's threads would wait here for the cores on which an engine computes.
    """
    across, down = grid
    thumbnail = _pick_nearest(mask, tile_size, tile_size)[None]
    canvas = _pick_nearest(mask, down * tile_size, across * tile_size)
    cut = canvas.reshape(down, tile_size, across, tile_size).swapaxes(1, 2).reshape(-1, tile_size, tile_size)
    return torch.from_numpy(np.concatenate([thumbnail, cut]))


def pack_mask(mask_tiles: torch.Tensor) -> torch.Tensor:
    """Pack bool [T, S, S] to uint8 [T, S, ceil(S/8)], the first pixel in the highest bit (as numpy.packbits)."""
    return torch.from_numpy(np.packbits(mask_tiles.numpy(), axis=-1))
