"""From items (tiles, masks, boxes) to the embeddings that stand at their placeholders."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from garserve.config import GARConfig
from garserve.inputs.processor import Item
from garserve.model.patch_tokens import normalise, patch_tokens, unpack
from garserve.model.replay import ReplayPlan
from garserve.model.tile_cache import Placement, TileCache
from garserve.model.vision import Projector, VisionTower
from garserve.tracing import span

# Computes uint8 tiles [T, 3, S, S] with masks of bits [T, S, ceil(S/8)] to features [T, n², C], any float dtype.
TileFeatures = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RegionEncoder(nn.Module):
    """Vision tower, projector and replay of one checkpoint; tiles that were computed before are not computed again."""

    tower: VisionTower
    projector: Projector
    like: torch.Tensor  # empty: the device and the dtype of features

    def __init__(
        self,
        config: GARConfig,
        *,
        vision: TileFeatures | None = None,
        tiles_at_once: int = 32,
        tile_cache_gb: float = 0.0,
    ) -> None:
        """Build the modules; with `vision`, which takes the place of tower and projector, neither of the two.

        `tiles_at_once` bounds the memory of one pass through the tower, `tile_cache_gb` (10⁹ bytes) that of the tiles
        which are kept from one call to the next.
        """
        super().__init__()
        self.config, self.vision = config, vision
        if vision is None:
            self.tower = VisionTower(config.vision)
            self.projector = Projector(config)
        self.tiles_at_once = tiles_at_once
        self.tile_cache = TileCache(tile_cache_gb)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def reset_buffers(self, dtype: torch.dtype) -> None:
        """Make on the CPU what is no weight of a checkpoint; the meta device leaves none of it."""
        self.like = torch.empty(0, dtype=dtype)
        if self.vision is None:
            self.tower.reset_rope()

    def place(self, device: str, dtype: torch.dtype) -> None:
        """Move the tower in torch, and compute in a dtype; rotary tables stay float32, as a checkpoint has them."""
        self.to(device, dtype)
        self.tower.reset_rope()
        self.to(device)

    @torch.inference_mode()
    def encode(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """Return one tensor an item: [T·n², C] for an image of T tiles, [n², C] for a region.

        They are views of one buffer, into which every row is written once.
        """
        if not items:
            return []
        placement, positions = self._place(items)
        features, slots, tokens = placement.features, placement.slots, self.config.tokens_per_tile
        counts = [_row_count(item, tokens) for item in items]
        out = features.new_empty(sum(counts), features.shape[2])
        views = list(out.split(counts))
        plan, row = ReplayPlan(), 0
        for item, count, view in zip(items, counts, views, strict=True):
            own = [slots[positions[key]] for key in item.keys]
            if item.rows is not None:
                view.copy_(item.rows)
            elif item.roi:
                plan.add(item.roi, own, row)
            else:
                torch.index_select(features, 0, _indices(own, features), out=view.unflatten(0, (-1, tokens)))
            row += count
        with span("replay"):
            plan.run(features, out, self.config.tokens_per_side)
        return views

    forward = encode  # for what wraps a module's calls, as vLLM's offloading of weights does

    def allocate(self) -> None:
        """Allocate the tile cache where features are computed, if that was not done yet."""
        self.tile_cache.allocate(self.like, self.config.tokens_per_tile, self.config.hidden_size)

    def _place(self, items: Sequence[Item]) -> tuple[Placement, dict[bytes, int]]:
        """Compute the tiles that are not known, and say where all of them lie."""
        tiles = {
            key: (tile, mask)
            for item in items
            for tile, mask, key in zip(item.tiles, item.masks, item.keys, strict=True)
        }
        keys = list(tiles)
        self.allocate()
        placement = self.tile_cache.place(keys, [key for item in items if item.roi is None for key in item.keys])
        missing = [keys[position] for position in placement.missing]
        if missing:
            try:
                with span("vision"):
                    computed = self.features(
                        *(torch.stack(part) for part in zip(*map(tiles.get, missing), strict=True))
                    )
                slots = [placement.slots[position] for position in placement.missing]
                placement.features.index_copy_(0, _indices(slots, computed), computed)
            except BaseException:
                self.tile_cache.forget(missing)
                raise
        return placement, {key: position for position, key in enumerate(keys)}

    def features(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compute uint8 tiles [T, 3, S, S] with packed masks [T, S, ceil(S/8)] to features [T, n², C]."""
        compute = self.vision or self._run_tower
        parts = [
            compute(some, bits)
            for some, bits in zip(tiles.split(self.tiles_at_once), masks.split(self.tiles_at_once), strict=True)
        ]
        return torch.cat(parts).to(self.like)

    def _run_tower(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projector(self.tower.run(patch_tokens(self.tower, self.config, tiles, masks)))
        return projected

    def normalise(self, tiles: torch.Tensor) -> torch.Tensor:
        """Turn uint8 tiles [T, 3, S, S] into what the tower's convolution reads."""
        return normalise(tiles.to(self.like.device), self.config, self.like.dtype)

    def unpack(self, masks: torch.Tensor) -> torch.Tensor:
        """Unpack mask bits to 0 and 1 in the tower's dtype: [T, S, S]."""
        return unpack(masks.to(self.like.device), self.config.tile_size).to(self.like.dtype)


def _row_count(item: Item, tokens: int) -> int:
    if item.rows is not None:
        return len(item.rows)
    return tokens if item.roi else tokens * len(item.tiles)


def _indices(slots: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    indices = torch.tensor(slots)
    return indices if like.device.type == "cpu" else indices.pin_memory().to(like.device, non_blocking=True)
