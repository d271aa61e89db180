"""RoI-aligned feature replay in plain PyTorch: a region's n² tokens read out of the image's tiles."""

import torch

from garserve.inputs.roi import RoI
from garserve.kernels.roi_axis import axis_weights


def replay(tiles: torch.Tensor, roi: RoI, tokens_per_side: int) -> torch.Tensor:
    """Replay one region from the features [tiles, n², C] of the tiles in `roi.window` (row by row) to [n², C].

    RoI-align over the box with 2x2 samples a bin, `aligned`; computed in float32, returned in the features' dtype.
    """
    side, window = tokens_per_side, roi.window
    rows, columns = window.bottom - window.top, window.right - window.left
    cells = (
        tiles.float().reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
    )
    x1, y1, x2, y2 = roi.box
    across = axis_weights(x1, x2, roi.grid[0] * side, side)[:, window.left * side : window.right * side]
    down = axis_weights(y1, y2, roi.grid[1] * side, side)[:, window.top * side : window.bottom * side]
    mixed = torch.einsum("by,yxc->bxc", down.to(cells.device), cells)
    return torch.einsum("ax,bxc->bac", across.to(cells.device), mixed).flatten(0, 1).to(tiles.dtype)
