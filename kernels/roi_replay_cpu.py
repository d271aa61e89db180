"""RoI replay on the CPU: every output row is a weighted sum of a few cells, that is a bag of torch's embedding_bag.

RoI-align with a fixed number of samples is separable. Along an axis, a bin reads at most 2 · sampling_ratio cells, and
samples that share cells share their weights: 3 · 3 cells a bin where bins are smaller than a cell, 16 at the most.
"""

import torch
from garserve.kernels.roi_axis import axes_weights
from torch.nn import functional

_TOGETHER = 32  # regions whose tiles are read from the pool, and made float32, at a time
_AT_ONCE = 4  # regions whose rows are summed before they are written: few enough to be in the cache still


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
    if not features.shape[2] or not len(regions):
        return
    for some, corners in zip(regions.split(_TOGETHER), boxes.split(_TOGETHER), strict=True):
        slots, cells, weights = _bags(table, some, corners, tokens_per_side, sampling_ratio)
        cells, rows = _float_rows(features, slots, cells)
        for start in range(0, len(some), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            targets = some[part, 3].tolist()
            sums = _sum_bags(rows, cells[part].flatten(0, 1), weights[part].flatten(0, 1))
            for target, region in zip(targets, sums.split(tokens_per_side**2), strict=True):
                out[target : target + tokens_per_side**2] = region


def _bags(
    table: torch.Tensor, regions: torch.Tensor, boxes: torch.Tensor, side: int, sampling_ratio: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return slots and cells within them (int64) and weights, each [R, side², K]: what each output row adds up.

    The weight is zero where there is less to read, or no tile.
    """
    most = 2 * sampling_ratio
    columns, rows = regions[:, 1] * side, regions[:, 2] * side
    x, across = _read(axes_weights(boxes[:, 0], boxes[:, 2], columns, side, sampling_ratio), columns, most)
    y, down = _read(axes_weights(boxes[:, 1], boxes[:, 3], rows, side, sampling_ratio), rows, most)
    x, across = x[:, None, :, None, :], across[:, None, :, None, :]  # [R, 1, side, 1, K]
    y, down = y[:, :, None, :, None], down[:, :, None, :, None]  # [R, side, 1, K, 1]
    first, width = (regions[:, field].long()[:, None, None, None, None] for field in (0, 1))
    slots = table[first + (y // side) * width + x // side].long()
    cells = (y % side) * side + x % side
    weights = (down * across).masked_fill(slots < 0, 0.0)
    bags = len(regions), side**2, -1
    return slots.reshape(bags), cells.reshape(bags), weights.reshape(bags)


def _read(weights: torch.Tensor, sizes: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which cells each bin reads of an axis, and their weights: [R, bins, most], padded with zero weights."""
    cells = weights.ne(0).float().topk(min(most, weights.shape[2]), dim=2, sorted=False).indices
    return cells.minimum(sizes.long()[:, None, None] - 1), weights.gather(2, cells)


def _float_rows(features: torch.Tensor, slots: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each slot and cell its row in a contiguous float32 table [rows, C], and the table."""
    tokens = features.shape[1]
    if features.dtype == torch.float32 and features.is_contiguous():
        return slots * tokens + cells, features.flatten(0, 1)
    used, places = slots.clamp(min=0).unique(return_inverse=True)
    return places * tokens + cells, features.index_select(0, used).float().flatten(0, 1)


def _sum_bags(rows: torch.Tensor, cells: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum rows [.., C] by cells and weights [bags, K] to [bags, C]; what has no weight is not read."""
    read = weights.ne(0)
    ends = read.sum(dim=1).cumsum(dim=0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return functional.embedding_bag(cells[read], rows, starts, mode="sum", per_sample_weights=weights[read])
