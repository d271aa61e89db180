"""One axis of RoI-align as interpolation matrices: RoI-align is separable, out = W_y · F · W_x for every channel."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AxisWeights:
    """How the bins of several regions read one axis."""

    weights: torch.Tensor  # float32 [regions, bins, longest axis]
    read: list[tuple[int, int]]  # per region, the half-open range of cells with weight; (0, 1) where there is none


def axes_weights(
    starts: torch.Tensor, ends: torch.Tensor, sizes: torch.Tensor, bins: int, sampling_ratio: int = 2
) -> AxisWeights:
    """Return the weights with which each output bin of each region reads the cells of one axis.

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
    return AxisWeights(weights, _ranges(weights))


def _ranges(weights: torch.Tensor) -> list[tuple[int, int]]:
    used = weights.ne(0).any(dim=1).int()  # [regions, cells]
    if not used.numel():
        return []
    begin = used.argmax(dim=1)
    end = used.shape[1] - used.flip(1).argmax(dim=1)
    none = used.any(dim=1).logical_not()
    begin, end = begin.masked_fill(none, 0), end.masked_fill(none, 1)
    return list(zip(begin.tolist(), end.tolist(), strict=True))


def axis_weights(start: float, end: float, size: int, bins: int, sampling_ratio: int = 2) -> torch.Tensor:
    """Return the weights [bins, size] of one region; see `axes_weights`."""
    starts, ends, sizes = torch.tensor([start]), torch.tensor([end]), torch.tensor([size])
    return axes_weights(starts, ends, sizes, bins, sampling_ratio).weights[0]


def cells_read(weights: torch.Tensor) -> tuple[int, int]:
    """Return the half-open range of cells that `weights` [bins, size] read; (0, 1) where they read none."""
    return _ranges(weights[None])[0]
