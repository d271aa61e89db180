"""The same model without one of its parts: what remains of the accuracy shows what the part is worth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from garserve.engine import Engine
from garserve.errors import RequestError
from garserve.evaluation.part import Part
from garserve.inputs.processor import Item
from garserve.model.encoder import RegionEncoder
from garserve.model.reference_backend import ReferenceBackend


def checked(part: Part, engine: Engine) -> RegionEncoder:
    """Return the encoder that a part can be taken out of; RequestError where it cannot."""
    if not isinstance(engine.backend, ReferenceBackend):
        raise RequestError(f"ablation: expected the reference backend, got {engine.backend.name!r}")
    encoder = engine.backend.model.encoder
    if part is Part.mask and encoder.vision is not None:
        raise RequestError("ablation: the mask embedding can be taken out of the torch tower only")
    return encoder


@contextmanager
def without(part: Part, engine: Engine) -> Iterator[Engine]:
    """Take out a part of a reference engine's model for a while.

    "replay": the crop tokens' features are zero. "mask": the tower's mask embedding is zero.
    """
    encoder = checked(part, engine)
    if part is Part.replay:
        whole = encoder.encode

        def silent(items: Sequence[Item]) -> list[torch.Tensor]:
            return [
                rows if item.roi is None else torch.zeros_like(rows)
                for item, rows in zip(items, whole(items), strict=True)
            ]

        encoder.encode = silent  # type: ignore[method-assign]
        try:
            yield engine
        finally:
            del encoder.encode
        return
    weight = encoder.tower.mask_patch_embedding.weight
    kept = weight.detach().clone()
    try:
        weight.data.zero_()
        encoder.tile_cache.clear()
        yield engine
    finally:
        weight.data.copy_(kept)
        encoder.tile_cache.clear()
