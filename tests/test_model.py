"""Tower, encoder and reference: batching changes nothing, masks and boxes matter, equal tiles are computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from garserve.checkpoint import Checkpoint
from garserve.inputs.processor import Processor
from garserve.inputs.prompts import stop_token_id
from garserve.inputs.request import RegionRequest
from garserve.model.reference import ReferenceGAR
from garserve.model.vision import apply_rope, turn


@pytest.fixture(scope="module")
def model(mini: Path) -> ReferenceGAR:
    return ReferenceGAR.load(Checkpoint.open(mini))


@pytest.fixture(scope="module")
def processor(mini: Path) -> Processor:
    return Processor(mini, Checkpoint.open(mini).config)


A, B = {"box": [5, 5, 60, 50]}, {"points": [[100, 60]], "radius": 12}


def test_embeddings_stand_at_their_placeholders(model: ReferenceGAR, processor: Processor, picture: np.ndarray) -> None:
    prepared = processor(RegionRequest(picture, [A, B], "Which?"))
    rows = model.embed(prepared)
    table = model.language_model.get_input_embeddings().weight
    inside = torch.zeros(len(rows), dtype=torch.bool)
    for (start, end), item in zip(prepared.spans, model.encoder.encode(prepared.items), strict=True):
        assert torch.equal(rows[start:end], item)
        inside[start:end] = True
    outside = torch.tensor(prepared.token_ids)[~inside]
    assert torch.equal(rows[~inside], table[outside])


def test_equal_tiles_are_computed_once(
    model: ReferenceGAR, processor: Processor, picture: np.ndarray, monkeypatch
) -> None:
    counts: list[int] = []
    original = model.encoder.features
    monkeypatch.setattr(model.encoder, "features", lambda t, m: (counts.append(len(t)), original(t, m))[1])
    prepared = processor(RegionRequest(picture, [A, B], "Which?"))
    together = model.encoder.encode([*prepared.items, *prepared.items])
    assert counts == [len({key for item in prepared.items for key in item.keys})]
    assert counts[0] == len(prepared.items[0].tiles)
    alone = [model.encoder.encode([item])[0] for item in prepared.items]
    for ours, own in zip(together, alone + alone, strict=True):
        assert torch.allclose(ours, own, atol=1e-5)
    assert model.encoder.encode([]) == []


def test_tiles_in_small_batches_give_the_same(model: ReferenceGAR, processor: Processor, picture: np.ndarray) -> None:
    item = processor(RegionRequest(picture, [A], "?")).items[0]
    whole = model.encoder.features(item.tiles, item.masks)
    model.encoder.tiles_at_once, before = 2, model.encoder.tiles_at_once
    try:
        assert torch.allclose(model.encoder.features(item.tiles, item.masks), whole, atol=1e-5)
    finally:
        model.encoder.tiles_at_once = before


def test_masks_and_boxes_matter(model: ReferenceGAR, processor: Processor, picture: np.ndarray) -> None:
    first, second = (processor(RegionRequest(picture, [region], "?")) for region in (A, B))
    assert first.items[0].hash != second.items[0].hash
    one, other = model.encoder.encode(first.items), model.encoder.encode(second.items)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(one, other, strict=True))


def test_batch_of_many_equals_one_by_one(model: ReferenceGAR, processor: Processor, picture: np.ndarray) -> None:
    requests = [
        RegionRequest(picture, [A]),
        RegionRequest(picture, [A, B], "How does <Prompt0> relate to <Prompt1>?"),
        RegionRequest(picture[:40, :40], [{"box": [0, 0, 40, 40]}], "What is <Prompt0>?"),
    ]
    prepared = [processor(request) for request in requests]
    stop = stop_token_id(processor.tokenizer)
    together, logits = model.generate(prepared, [9, 5, 12], stop)
    for one, tokens, row, limit in zip(prepared, together, logits, (9, 5, 12), strict=True):
        alone, own = model.generate([one], [limit], stop)
        assert alone[0] == tokens
        assert torch.allclose(own[0], row, atol=1e-4)
        assert len(tokens) == limit
    assert len({tuple(tokens[:5]) for tokens in together}) == 3


def test_stop_token_ends_an_answer(model: ReferenceGAR, processor: Processor, picture: np.ndarray) -> None:
    prepared = processor(RegionRequest(picture, [A]))
    free, _ = model.generate([prepared], [12], -1)
    stop = free[0][4]
    stopped, _ = model.generate([prepared], [12], stop)
    assert stopped[0] == free[0][: free[0].index(stop) + 1]


class TestHashes:
    """Item hashes cover everything that the embeddings depend on, and nothing else."""

    @pytest.fixture
    def hashes(self, processor: Processor, picture: np.ndarray):
        def of(*regions: dict, question: str = "?", image: np.ndarray = picture, **options: object) -> list[str]:
            tuned = processor.variant(**options) if options else processor  # type: ignore[arg-type]
            return [item.hash for item in tuned(RegionRequest(image, list(regions), question)).items]

        return of

    def test_same_request_same_hashes(self, hashes) -> None:
        assert hashes(A, B) == hashes(A, B, question="Another?")

    def test_order_of_regions_does_not_change_the_image(self, hashes) -> None:
        ab, ba = hashes(A, B), hashes(B, A)
        assert ab[0] == ba[0]
        assert ab[1:] == ba[:0:-1]

    def test_other_masks_change_the_image(self, hashes) -> None:
        assert len({hashes(A)[0], hashes(B)[0], hashes(A, B)[0]}) == 3

    def test_a_region_depends_on_the_masks_in_its_own_tiles_only(self, hashes) -> None:
        near, far = {"box": [30, 30, 70, 70]}, {"box": [120, 70, 139, 89]}
        assert hashes(A, near)[1] != hashes(A)[1]
        assert hashes(A, far)[1] == hashes(A)[1]

    def test_other_pixels_change_it(self, hashes, picture: np.ndarray) -> None:
        changed = picture.copy()
        changed[45, 70] = 255 - changed[45, 70]
        assert hashes(A)[0] != hashes(A, image=changed)[0]

    def test_scale_changes_regions_only(self, hashes) -> None:
        released, geometric = hashes(A, box_scale="released"), hashes(A, box_scale="geometric")
        assert released[0] == geometric[0]
        assert released[1] != geometric[1]

    def test_tiling_changes_it(self, hashes) -> None:
        assert not set(hashes(A, max_num_tiles=1)) & set(hashes(A, max_num_tiles=6))


def test_small_and_extreme_images(model: ReferenceGAR, processor: Processor) -> None:
    for shape in ((1, 1), (20, 4000), (300, 2)):
        image = np.full((*shape, 3), 90, np.uint8)
        prepared = processor(RegionRequest(image, [np.ones(shape, bool)]))
        tokens, _ = model.generate([prepared], [2], -1)
        assert len(tokens[0]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_turning_pairs_as_complex_numbers_is_the_definition(dtype: torch.dtype) -> None:
    """On a view that is not contiguous, as the attention has it.

    Bit for bit with AVX2; where a compiler fuses a product with the sum, float32 may round once less.
    """
    whole = torch.randn(3, 50, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = whole.permute(2, 0, 3, 1, 4)[1][:, :, 1:]
    angles = torch.randn(49, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    torch.testing.assert_close(turn(tokens, cos, sin), apply_rope(tokens, cos, sin), rtol=0, atol=1e-6)
