"""The truth of RoI replay: scalar loops in float64, slow and obvious. Everything faster is held against this.

The rules are torchvision's roi_align with aligned=True and a fixed sampling_ratio, on a channels-last map. They include
that a sample's position is a float32, rounded step by step: at the border it decides whether the sample counts.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Cell = NDArray[np.float64]  # [C]
ReadCell = Callable[[int, int], Cell]


def roi_replay_ref(
    features: torch.Tensor, box: tuple[float, float, float, float], bins: int, sampling_ratio: int = 2
) -> torch.Tensor:
    """Align one box [x1, y1, x2, y2] (feature cells) of a map [H, W, C] to float64 [bins*bins, C], row-major."""
    cells = features.double().numpy()
    return _align(lambda y, x: cells[y, x], cells.shape, box, bins, sampling_ratio)


def roi_replay_tiles_ref(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int = 2,
) -> torch.Tensor:
    """Align regions of maps that lie in tiles, as `replay_op.roi_replay` has them, to float64 [regions, n², C]."""
    cells, slots, side = features.double().cpu().numpy(), table.tolist(), tokens_per_side
    nothing = np.zeros(cells.shape[2])
    rows = []
    for (first, across, down, _), box in zip(regions.tolist(), boxes.tolist(), strict=True):

        def read(y: int, x: int, first: int = first, across: int = across) -> Cell:
            slot = slots[first + (y // side) * across + x // side]
            return cells[slot, (y % side) * side + x % side] if slot >= 0 else nothing

        rows.append(_align(read, (down * side, across * side, cells.shape[2]), box, side, sampling_ratio))
    return torch.stack(rows) if rows else torch.zeros(0, side * side, cells.shape[2], dtype=torch.float64)


def _align(read: ReadCell, shape: Sequence[int], box: Sequence[float], bins: int, sampling_ratio: int) -> torch.Tensor:
    height, width, channels = shape
    x1, y1, x2, y2 = (np.float32(edge) - np.float32(0.5) for edge in box)
    out = np.zeros((bins * bins, channels))
    for row in range(bins):
        for column in range(bins):
            for sample_y in range(sampling_ratio):
                for sample_x in range(sampling_ratio):
                    y = _position(y1, y2, row, sample_y, bins, sampling_ratio)
                    x = _position(x1, x2, column, sample_x, bins, sampling_ratio)
                    out[row * bins + column] += _bilinear(read, y, x, height, width) / sampling_ratio**2
    return torch.from_numpy(out)


def _position(low: np.float32, high: np.float32, bin_index: int, sample: int, bins: int, sampling_ratio: int) -> float:
    step = (high - low) / np.float32(bins)
    within = np.float32(sample + 0.5) * step / np.float32(sampling_ratio)
    return float(low + np.float32(bin_index) * step + within)


def _bilinear(read: ReadCell, y: float, x: float, height: int, width: int) -> Cell | float:
    """Interpolate a map [H, W, C] at (y, x): zero further than one cell outside, the border's cell within it."""
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (
        (1 - down) * (1 - across) * read(top, left)
        + (1 - down) * across * read(top, right)
        + down * (1 - across) * read(bottom, left)
        + down * across * read(bottom, right)
    )
