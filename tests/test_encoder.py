"""The vision half on another device or in another dtype."""

import torch
from garserve.export.source import load_encoder

from garserve.checkpoint import TINY, Checkpoint


def test_placed_in_bfloat16() -> None:
    checkpoint = Checkpoint.open(TINY)
    exact, placed = load_encoder(checkpoint), load_encoder(checkpoint)
    placed.place("cpu", torch.bfloat16)
    assert {weight.dtype for weight in placed.parameters()} == {torch.bfloat16}
    tables = [(a, b) for a, b in zip(exact.buffers(), placed.buffers(), strict=True) if a.numel()]
    assert tables
    assert all(torch.equal(a, b) for a, b in tables)
    side = checkpoint.config.tile_size
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(2, side, -(-side // 8), dtype=torch.uint8)
    with torch.inference_mode():
        expected, found = exact.features(tiles, masks), placed.features(tiles, masks)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02
