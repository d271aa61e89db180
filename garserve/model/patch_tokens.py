"""Tiles to patch tokens: on a GPU in one launch from uint8, elsewhere by the tower's two convolutions.

The environment variable GARSERVE_PATCH_EMBED forces `triton` (on the CPU in Triton's interpreter only) or `plain`.
On a CPU the convolutions are as fast, and less than a hundredth of the tower either way.
"""

import os

import torch

from garserve.config import GARConfig
from garserve.errors import RequestError
from garserve.model.vision import VisionTower

FORCE = "GARSERVE_PATCH_EMBED"


def patch_tokens(tower: VisionTower, config: GARConfig, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Embed uint8 tiles [T, 3, S, S] with masks of bits [T, S, ceil(S/8)] to [T, grid², width], in the tower's dtype.

    Raises RequestError where the environment names an unknown way.
    """
    pixel, mask = tower.patch_embed["proj"].weight, tower.mask_patch_embedding.weight
    chosen = os.environ.get(FORCE) or ("plain" if pixel.device.type == "cpu" else "triton")
    tiles, masks = tiles.to(pixel.device), masks.to(pixel.device)
    if chosen == "triton":
        from garserve.kernels.patch_embed import fold, patch_embed

        return patch_embed(fold(pixel, mask, config.pixel_mean, config.pixel_std), tiles, masks)
    if chosen != "plain":
        raise RequestError(f"{FORCE}: expected triton or plain, got {chosen!r:.80}")
    shown = unpack(masks, config.tile_size).to(pixel.dtype)
    embedded = tower.patch_embed["proj"](normalise(tiles, config, pixel.dtype)) + tower.embed_mask(shown)
    return embedded.flatten(2).transpose(1, 2)


def normalise(tiles: torch.Tensor, config: GARConfig, dtype: torch.dtype) -> torch.Tensor:
    """Turn uint8 pixels into the tower's range: (v - 127.5) / 127.5 for the released models."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=tiles.device)[:, None, None] * 255.0
        for values in (config.pixel_mean, config.pixel_std)
    )
    return ((tiles.float() - mean) / std).to(dtype)


def unpack(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Unpack mask bits [T, S, ceil(S/8)] to uint8 0 and 1: [T, S, S]."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    bits = (masks[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :side]
