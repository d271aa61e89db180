"""From a normalised box to the feature cells that the replay reads, and to the tiles that hold them.

This is the one place that knows the two box scales.
"""

from dataclasses import dataclass

import numpy as np
import torch

from garserve.config import GARConfig
from garserve.inputs.shapes import Box
from garserve.inputs.tiles import Grid
from garserve.kernels.roi_axis import axes_weights, cells_read


@dataclass(frozen=True)
class Window:
    """A rectangle of tiles of a grid: rows top..bottom and columns left..right, half-open."""

    top: int
    bottom: int
    left: int
    right: int

    def tile_indices(self, grid: Grid) -> list[int]:
        """Return the tiles' positions in an image's tile list, in which the thumbnail is number 0."""
        across = grid[0]
        return [
            1 + row * across + column for row in range(self.top, self.bottom) for column in range(self.left, self.right)
        ]


@dataclass(frozen=True)
class RoI:
    """What to replay: the box in feature cells, the grid that it refers to, and the tiles that it reads."""

    box: Box
    grid: Grid
    window: Window


def cells_box(box: Box, grid: Grid, tokens_per_side: int) -> Box:
    """Scale a normalised box to the cells of the whole feature map (n·across by n·down), rounded to float32."""
    across, down = grid[0] * tokens_per_side, grid[1] * tokens_per_side
    x1, y1, x2, y2 = (np.float32(edge * side) for edge, side in zip(box, (across, down, across, down), strict=True))
    return (float(x1), float(y1), float(x2), float(y2))


def replay_roi(box: Box, grid: Grid, config: GARConfig) -> RoI:
    """Return the box to replay in feature cells, by the checkpoint's `replay_box_scale`, and the tiles it reads.

    `geometric` is the box itself. `released` multiplies it once more by 1 / (patch size · pooling), as the authors'
    code does inside roi_align, in training and in inference; their weights expect it.
    """
    side = config.tokens_per_side
    scaled = cells_box(box, grid, side)
    if config.replay_box_scale == "released":
        factor = np.float32(1.0 / (config.vision.patch_size * config.pooling))
        x1, y1, x2, y2 = (float(np.float32(edge) * factor) for edge in scaled)
        scaled = (x1, y1, x2, y2)
    return RoI(scaled, grid, _window(scaled, grid, side))


def _window(box: Box, grid: Grid, side: int) -> Window:
    """Return the tiles that the replay of a box in feature cells reads; `side` cells are a tile's."""
    if grid == (1, 1):
        return Window(0, 1, 0, 1)
    edges, sizes = torch.tensor(box), torch.tensor(grid) * side
    (left, right), (top, bottom) = map(cells_read, axes_weights(edges[:2], edges[2:], sizes, side))
    return Window(top // side, (bottom - 1) // side + 1, left // side, (right - 1) // side + 1)
