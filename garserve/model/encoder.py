"""From items (tiles, masks, boxes) to the embeddings that stand at their placeholders."""

from collections.abc import Sequence

import torch
from torch import nn

from garserve.config import GARConfig
from garserve.inputs.processor import Item
from garserve.model.replay import replay
from garserve.model.vision import Projector, VisionTower


class RegionEncoder(nn.Module):
    """Vision tower, projector and replay of one checkpoint; each distinct tile of a call is computed once."""

    def __init__(self, config: GARConfig, *, tiles_at_once: int = 32) -> None:
        """Build the modules; `tiles_at_once` bounds the memory of one pass through the tower."""
        super().__init__()
        self.config = config
        self.tower = VisionTower(config.vision)
        self.projector = Projector(config)
        self.tiles_at_once = tiles_at_once

    @torch.inference_mode()
    def encode(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """Return one tensor an item: [T·n², C] for an image of T tiles, [n², C] for a region."""
        rows: dict[bytes, int] = {}
        tiles, masks = [], []
        for item in items:
            for tile, mask, key in zip(item.tiles, item.masks, item.keys, strict=True):
                if key not in rows:
                    rows[key] = len(rows)
                    tiles.append(tile)
                    masks.append(mask)
        if not rows:
            return []
        features = self.features(torch.stack(tiles), torch.stack(masks))
        return [self._embed(item, features[[rows[key] for key in item.keys]]) for item in items]

    def _embed(self, item: Item, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(0, 1) if item.roi is None else replay(features, item.roi, self.config.tokens_per_side)

    def features(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compute uint8 tiles [T, 3, S, S] with packed masks [T, S, ceil(S/8)] to features [T, n², C]."""
        parts = [
            self.projector(self.tower(self.normalise(some), self.unpack(bits)))
            for some, bits in zip(tiles.split(self.tiles_at_once), masks.split(self.tiles_at_once), strict=True)
        ]
        return torch.cat(parts)

    def normalise(self, tiles: torch.Tensor) -> torch.Tensor:
        """Turn uint8 pixels into the tower's dtype and range: (v - 127.5) / 127.5 for the released models."""
        weight = self.projector.linear_1.weight
        mean = torch.tensor(self.config.pixel_mean, dtype=torch.float32, device=weight.device)[:, None, None] * 255.0
        std = torch.tensor(self.config.pixel_std, dtype=torch.float32, device=weight.device)[:, None, None] * 255.0
        return ((tiles.to(weight.device).float() - mean) / std).to(weight.dtype)

    def unpack(self, masks: torch.Tensor) -> torch.Tensor:
        """Unpack mask bits to 0 and 1 in the tower's dtype: [T, S, S]."""
        weight = self.projector.linear_1.weight
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=weight.device)
        bits = (masks.to(weight.device)[..., None] >> shifts) & 1
        return bits.flatten(-2)[..., : self.config.tile_size].to(weight.dtype)
