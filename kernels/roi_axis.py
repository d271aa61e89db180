"""One axis of RoI-align as interpolation matrices: RoI-align is separable, out = W_y · F · W_x for every channel."""

import torch


def axes_weights(
    starts: torch.Tensor, ends: torch.Tensor, sizes: torch.Tensor, bins: int, sampling_ratio: int = 2
) -> torch.Tensor:
    """Return the weights float32 [regions, bins, longest axis] with which bins of regions read the cells of one axis.

    `starts` and `ends` [regions] are the boxes' edges in feature cells (float32, CPU), before the half-cell shift of
    `aligned=True`; `sizes` [regions] are the axes' lengths. Samples outside -1..size count as zero, samples beyond the
    outermost cell centres take the outermost cell (the rules of torchvision's roi_align). Positions are computed in
    float32 as upstream computes them.
    """
    low, high = (edge.float()[:, None, None] - 0.5 for edge in (starts, ends))
    step = (high - low) / bins
    bin_index = torch.arange(bins, dtype=torch.float32)[:, None]
    sample = (torch.arange(sampling_ratio, dtype=torch.float32) + 0.5)[None, :]
    position = low + bin_index * step + sample * step / sampling_ratio  # [regions, bins, samples]

    last = (sizes.long() - 1)[:, None, None]
    counted = ((position >= -1.0) & (position <= last + 1)).float() / sampling_ratio
    position = torch.minimum(position.clamp(min=0.0), last.float())
    cell = position.floor()
    fraction = position - cell
    near = cell.long()
    far = torch.minimum(near + 1, last)
    weights = torch.zeros(len(starts), bins, int(sizes.max()) if len(sizes) else 0)
    weights.scatter_add_(2, near, (1.0 - fraction) * counted)
    weights.scatter_add_(2, far, fraction * counted)
    return weights


def axis_weights(start: float, end: float, size: int, bins: int, sampling_ratio: int = 2) -> torch.Tensor:
    """Return the weights [bins, size] of one region; see `axes_weights`."""
    starts, ends, sizes = torch.tensor([start]), torch.tensor([end]), torch.tensor([size])
    return axes_weights(starts, ends, sizes, bins, sampling_ratio)[0]


def cells_read(weights: torch.Tensor) -> tuple[int, int]:
    """Return the half-open range of cells that `weights` [bins, size] read; (0, 1) where they read none."""
    used = weights.ne(0).any(dim=0).nonzero()[:, 0].tolist()
    return (used[0], used[-1] + 1) if used else (0, 1)
