"""The truth of RoI replay: scalar loops in float64, slow and obvious. Everything faster is held against this.

The rules are torchvision's roi_align with aligned=True and a fixed sampling_ratio, on a channels-last map.
"""

import math

import torch


def roi_replay_ref(
    features: torch.Tensor, box: tuple[float, float, float, float], bins: int, sampling_ratio: int = 2
) -> torch.Tensor:
    """Align one box [x1, y1, x2, y2] (feature cells) of a map [H, W, C] to float64 [bins*bins, C], row-major."""
    cells = features.double()
    height, width, channels = cells.shape
    x1, y1, x2, y2 = (float(edge) - 0.5 for edge in box)
    bin_width, bin_height = (x2 - x1) / bins, (y2 - y1) / bins
    out = torch.zeros(bins * bins, channels, dtype=torch.float64)
    for row in range(bins):
        for column in range(bins):
            total = torch.zeros(channels, dtype=torch.float64)
            for sample_y in range(sampling_ratio):
                for sample_x in range(sampling_ratio):
                    y = y1 + row * bin_height + (sample_y + 0.5) * bin_height / sampling_ratio
                    x = x1 + column * bin_width + (sample_x + 0.5) * bin_width / sampling_ratio
                    total += _bilinear(cells, y, x, height, width)
            out[row * bins + column] = total / sampling_ratio**2
    return out


def _bilinear(cells: torch.Tensor, y: float, x: float, height: int, width: int) -> torch.Tensor:
    """Interpolate a map [H, W, C] at (y, x): zero further than one cell outside, the border's cell within it."""
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return torch.zeros(cells.shape[2], dtype=torch.float64)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (
        (1 - down) * (1 - across) * cells[top, left]
        + (1 - down) * across * cells[top, right]
        + down * (1 - across) * cells[bottom, left]
        + down * across * cells[bottom, right]
    )
