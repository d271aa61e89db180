"""One axis of RoI-align as an interpolation matrix: RoI-align is separable, out = W_y · F · W_x for every channel."""

import torch


def axis_weights(start: float, end: float, size: int, bins: int, sampling_ratio: int = 2) -> torch.Tensor:
    """Return the weights [bins, size] (float32, CPU) with which each output bin reads the cells of one axis.

    `start` and `end` are the box's edges in feature cells, before the half-cell shift of `aligned=True`; samples
    outside -1..size count as zero, samples beyond the outermost cell centres take the outermost cell (the rules of
    torchvision's roi_align). Positions are computed in float32 as upstream computes them.
    """
    low = torch.tensor(start, dtype=torch.float32) - 0.5
    high = torch.tensor(end, dtype=torch.float32) - 0.5
    step = (high - low) / bins
    bin_index = torch.arange(bins, dtype=torch.float32)[:, None]
    sample = (torch.arange(sampling_ratio, dtype=torch.float32) + 0.5)[None, :]
    position = low + bin_index * step + sample * step / sampling_ratio  # [bins, samples]

    counted = ((position >= -1.0) & (position <= size)).float() / sampling_ratio
    position = position.clamp(0.0, size - 1.0)
    cell = position.floor()
    fraction = position - cell
    near, far = cell.long(), (cell.long() + 1).clamp(max=size - 1)
    weights = torch.zeros(bins, size)
    weights.scatter_add_(1, near, (1.0 - fraction) * counted)
    weights.scatter_add_(1, far, fraction * counted)
    return weights


def cells_read(weights: torch.Tensor) -> tuple[int, int]:
    """Return the half-open range of cells that `weights` [bins, size] read; (0, 1) where they read none."""
    used = weights.ne(0).any(dim=0).nonzero()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
