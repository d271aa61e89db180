"""What a checkpoint's vision half is, in one short text: exports carry it, and stand in for no other."""

import json
from dataclasses import asdict
from typing import Any

import torch
from blake3 import blake3

from garserve.checkpoint import MODULE_PREFIXES, Checkpoint
from garserve.config import GARConfig

VISION_PREFIXES = tuple(prefix for prefix, module in MODULE_PREFIXES.items() if module.startswith("encoder."))
_DIGEST_BYTES = 16


def vision_settings(config: GARConfig) -> dict[str, Any]:
    """Return as JSON data what the features of a tile depend on beside weights, and what is needed to cut tiles."""
    return {
        "vision": asdict(config.vision),
        "pooling": config.pooling,
        "hidden_size": config.hidden_size,
        "tokens_per_side": config.tokens_per_side,
        "pixel_mean": list(config.pixel_mean),
        "pixel_std": list(config.pixel_std),
        "max_num_tiles": config.max_num_tiles,
    }


def vision_fingerprint(checkpoint: Checkpoint) -> str:
    """Return 32 hexadecimal digits over the names, dtypes, shapes and values of tower, mask embedding and projector.

    The decoder is left out: a checkpoint that was tuned further with its vision half frozen keeps the fingerprint.
    """
    settings = {key: value for key, value in vision_settings(checkpoint.config).items() if key != "max_num_tiles"}
    digest = blake3(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors(VISION_PREFIXES), key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest(_DIGEST_BYTES)
