"""From regions' RoIs to the tensors of the replay operator: which tiles each region reads, and where they lie."""

from collections.abc import Sequence

import torch

from garserve.inputs.roi import RoI
from garserve.kernels.replay_op import roi_replay


class ReplayPlan:
    """All regions of one launch. Tiles lie in slots of a features tensor [slots, n², C], in any order."""

    def __init__(self) -> None:
        self._table: list[int] = []
        self._regions: list[tuple[int, int, int, int]] = []
        self._boxes: list[tuple[float, float, float, float]] = []

    def add(self, roi: RoI, slots: Sequence[int], row: int) -> None:
        """Add a region whose window's tiles lie in `slots`, row by row, and whose n² output rows begin at `row`."""
        across, down = roi.grid
        entries = [-1] * (across * down)
        for place, slot in zip(roi.window.tile_indices(roi.grid), slots, strict=True):
            entries[place - 1] = slot
        self._regions.append((len(self._table), across, down, row))
        self._boxes.append(roi.box)
        self._table += entries

    def run(self, features: torch.Tensor, out: torch.Tensor, tokens_per_side: int) -> None:
        """Replay all regions into their rows of `out` [rows, C]."""
        table = torch.tensor(self._table, dtype=torch.int32)
        regions = torch.tensor(self._regions, dtype=torch.int32).reshape(-1, 4)
        boxes = torch.tensor(self._boxes, dtype=torch.float32).reshape(-1, 4)
        if features.device.type != "cpu":  # from pinned memory, so that the host does not wait for the device
            table, regions, boxes = (
                tensor.pin_memory().to(features.device, non_blocking=True) for tensor in (table, regions, boxes)
            )
        roi_replay(features, table, regions, boxes, out, tokens_per_side)


def replay(tiles: torch.Tensor, roi: RoI, tokens_per_side: int) -> torch.Tensor:
    """Replay one region from the features [tiles, n², C] of the tiles in `roi.window` (row by row) to [n², C]."""
    out = tiles.new_empty(tokens_per_side**2, tiles.shape[2])
    plan = ReplayPlan()
    plan.add(roi, range(len(tiles)), 0)
    plan.run(tiles, out, tokens_per_side)
    return out
