"""RoI replay on the CPU: for each region, two small matrices over the cells that it reads, in float32.

RoI-align with a fixed number of samples is separable, out = W_y · F · W_x. F is gathered from the tiles cell by cell,
only the rectangle that the box reads, and the axis that shrinks most goes first.
"""

import torch
from garserve.kernels.roi_axis import axes_weights


def roi_replay_cpu(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    out: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int,
) -> None:
    """Fill the rows of `out` for tensors of `replay_op.roi_replay`."""
    side = tokens_per_side
    columns, rows = regions[:, 1] * side, regions[:, 2] * side
    across = axes_weights(boxes[:, 0], boxes[:, 2], columns, side, sampling_ratio)
    down = axes_weights(boxes[:, 1], boxes[:, 3], rows, side, sampling_ratio)
    flat = features.flatten(0, 1) if features.is_contiguous() else None
    for index, (first, width, _, target) in enumerate(regions.tolist()):
        (left, right), (top, bottom) = across.read[index], down.read[index]
        y, x = torch.arange(top, bottom), torch.arange(left, right)
        slots = table[first + (y // side)[:, None] * width + x // side].long()
        inner = (y % side)[:, None] * side + x % side
        shown = slots.clamp(min=0)
        cells = features[shown, inner] if flat is None else flat[shown * side**2 + inner]
        cells = cells.float()
        if int(slots.min()) < 0:
            cells[slots < 0] = 0
        wx, wy = across.weights[index, :, left:right], down.weights[index, :, top:bottom]
        out[target : target + side**2] = _align(wy, cells, wx)


def _align(down: torch.Tensor, cells: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Return W_y [n, h] · F [h, w, C] · W_xᵀ [w, n] as [n², C]."""
    height, width, channels = cells.shape
    if height >= width:
        mixed = (down @ cells.reshape(height, -1)).reshape(-1, width, channels)
        return torch.matmul(across, mixed).reshape(-1, channels)
    mixed = torch.matmul(across, cells)  # [h, n, C]
    return (down @ mixed.reshape(height, -1)).reshape(-1, channels)
