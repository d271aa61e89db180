"""Tiles that were computed before are not computed again, and what is read is always the tile that was asked for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import garserve
from garserve.checkpoint import Checkpoint
from garserve.engine import Engine
from garserve.errors import RequestError
from garserve.inputs.processor import Item, Processor
from garserve.inputs.request import RegionRequest
from garserve.model.reference import ReferenceGAR
from garserve.model.tile_cache import TileCache, TileCounts
from tests.requests_mix import mixed_requests, tokens

TOKENS, CHANNELS = 4, 3
BYTES = TOKENS * CHANNELS * 4  # of a tile


def value(key: bytes) -> torch.Tensor:
    return torch.full((TOKENS, CHANNELS), float(int.from_bytes(key, "big")))


def step(cache: TileCache, keys: list[bytes]) -> list[int]:
    """Serve one step as the encoder does, and check that each key's slot holds its tile."""
    cache.allocate(torch.zeros(1), TOKENS, CHANNELS)
    placement = cache.place(keys, keys)
    for position in placement.missing:
        placement.features[placement.slots[position]] = value(keys[position])
    for key, slot in zip(keys, placement.slots, strict=True):
        assert torch.equal(placement.features[slot], value(key))
    assert len(set(placement.slots)) == len(keys)
    return placement.missing


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(0, 6),
    steps=st.lists(st.sets(st.integers(0, 9), max_size=8).map(sorted), max_size=30),
    forgotten=st.sets(st.integers(0, 29)),
)
def test_every_step_reads_the_tiles_it_asked_for(capacity: int, steps: list[list[int]], forgotten: set[int]) -> None:
    """Against a list in the order of use, whatever the order of steps, down to no room at all."""
    cache, held = TileCache((capacity + 0.5) * BYTES / 1e9), list[int]()
    for number, asked in enumerate(steps):
        missing = step(cache, [bytes([one]) for one in asked])
        assert cache.capacity == capacity
        assert [asked[position] for position in missing] == [one for one in asked if one not in held]
        if len(asked) <= capacity:
            hits = [one for one in asked if one in held]
            held = [one for one in held if one not in hits] + hits
            held = (held + [one for one in asked if one not in hits])[-capacity:] if capacity else []
        if number in forgotten and asked:
            cache.forget([bytes([asked[0]])])
            held = [one for one in held if one != asked[0]]
    assert cache.counts.misses == cache.counts.computed == cache.counts.asked - cache.counts.hits


def test_the_least_recently_used_tile_makes_room() -> None:
    cache = TileCache(3.5 * BYTES / 1e9)
    assert step(cache, [b"\1", b"\2", b"\3"]) == [0, 1, 2]
    assert step(cache, [b"\1"]) == []
    assert step(cache, [b"\4"]) == [0]  # in the place of 2
    assert step(cache, [b"\1", b"\3", b"\4"]) == []
    assert step(cache, [b"\2"]) == [0]
    assert cache.counts == TileCounts(asked=9, computed=5, hits=4, misses=5, evicted=2)
    assert cache.counts.avoided == 4


@pytest.mark.parametrize("size", [-0.1, float("inf"), float("nan")])
def test_no_such_size(size: float) -> None:
    with pytest.raises(RequestError, match="tile_cache_gb: expected 0 or more, got"):
        TileCache(size)


def gigabytes(model: ReferenceGAR, tiles: int) -> float:
    config = model.encoder.config
    return (tiles + 0.5) * config.tokens_per_tile * config.hidden_size * 4 / 1e9


@pytest.fixture(scope="module")
def plain(mini: Path) -> ReferenceGAR:
    return ReferenceGAR.load(Checkpoint.open(mini))


@pytest.fixture
def kept(plain: ReferenceGAR, request: pytest.FixtureRequest) -> Iterator[ReferenceGAR]:
    """The same model with room for some tiles."""
    encoder, before = plain.encoder, plain.encoder.tile_cache
    encoder.tile_cache = TileCache(gigabytes(plain, getattr(request, "param", 100)))
    yield plain
    encoder.tile_cache = before


@pytest.fixture(scope="module")
def steps(mini: Path, picture: np.ndarray) -> list[list[Item]]:
    """What eight steps encode: requests about two pictures and many regions, in a random order, two a step."""
    processor = Processor(mini, Checkpoint.open(mini).config)
    rng = np.random.default_rng(0)
    mirrored = np.ascontiguousarray(picture[:, ::-1])
    prepared = []
    for number in range(16):
        x, y = (int(value) for value in rng.integers(0, 70, 2))
        regions = [{"box": [x, y, x + 20, y + 15]}] + [{"points": [[100, 60]], "radius": 9}] * (number % 2)
        prepared.append(processor(RegionRequest(mirrored if number % 3 == 0 else picture, regions, "?")))
    return [[*one.items, *other.items] for one, other in zip(prepared[::2], prepared[1::2], strict=True)]


@pytest.mark.parametrize("kept", [0, 3, 9, 100], indirect=True, ids="room for {} tiles".format)
def test_rows_are_those_of_computing_everything_anew(kept: ReferenceGAR, steps: list[list[Item]]) -> None:
    encoder, cache = kept.encoder, kept.encoder.tile_cache
    ours = [[rows.clone() for rows in encoder.encode(items)] for items in steps]
    counts = cache.counts
    encoder.tile_cache = TileCache(0)
    anew = [encoder.encode(items) for items in steps]
    for some, others in zip(ours, anew, strict=True):
        for rows, expected in zip(some, others, strict=True):
            # Other tiles in a pass change the order of sums: 2e-6 of values near 1 on a CPU.
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert counts.asked == encoder.tile_cache.counts.asked
    if cache.capacity == 100:
        distinct = {key for items in steps for item in items for key in item.keys}
        assert counts.computed == len(distinct) < encoder.tile_cache.counts.computed
    else:
        assert counts.computed > len({key for item in steps[0] for key in item.keys})


def test_one_tile_at_a_time_is_bitwise_the_same(kept: ReferenceGAR, steps: list[list[Item]]) -> None:
    """Where a pass through the tower has always the same number of tiles, nothing can tell kept tiles from new ones."""
    encoder = kept.encoder
    encoder.tiles_at_once, before = 1, encoder.tiles_at_once
    try:
        ours = [[rows.clone() for rows in encoder.encode(items)] for items in steps]
        encoder.tile_cache = TileCache(0)
        anew = [encoder.encode(items) for items in steps]
    finally:
        encoder.tiles_at_once = before
    assert all(
        torch.equal(a, b) for some, others in zip(ours, anew, strict=True) for a, b in zip(some, others, strict=True)
    )


def test_tiles_that_no_region_touches_are_kept_from_region_to_region(
    kept: ReferenceGAR, mini: Path, picture: np.ndarray
) -> None:
    processor = Processor(mini, Checkpoint.open(mini).config)
    first, second = (processor(RegionRequest(picture, [{"box": [x, 5, x + 9, 20]}], "?")) for x in (5, 110))
    kept.encoder.encode(first.items)
    before = kept.encoder.tile_cache.counts
    assert before.computed == len(first.items[0].tiles)
    kept.encoder.encode(second.items)
    computed = kept.encoder.tile_cache.counts.computed - before.computed
    changed = sum(one != other for one, other in zip(first.items[0].keys, second.items[0].keys, strict=True))
    assert computed == changed < len(second.items[0].tiles)


def test_regions_that_come_after_their_image_ask_for_nothing_new(
    kept: ReferenceGAR, mini: Path, picture: np.ndarray
) -> None:
    """vLLM may encode them in a later step; how often tiles were reused does not depend on it."""
    processor = Processor(mini, Checkpoint.open(mini).config)
    image, *regions = processor(RegionRequest(picture, [{"box": [5, 5, 60, 50]}, {"box": [50, 9, 99, 40]}], "?")).items
    tiles = len(image.keys)
    kept.encoder.encode([image])
    kept.encoder.encode(regions)
    assert kept.encoder.tile_cache.counts == TileCounts(
        asked=tiles, computed=tiles, hits=len({key for region in regions for key in region.keys}), misses=tiles
    )


@pytest.mark.parametrize("kept", [0], indirect=True, ids=["no room"])
def test_regions_whose_tiles_are_gone_ask_for_them_again(kept: ReferenceGAR, mini: Path, picture: np.ndarray) -> None:
    processor = Processor(mini, Checkpoint.open(mini).config)
    image, region = processor(RegionRequest(picture, [{"box": [5, 5, 60, 50]}], "?")).items
    for items in ([image], [region], [region, region]):
        kept.encoder.encode(items)
    counts = kept.encoder.tile_cache.counts
    assert counts.asked == counts.computed == len(image.keys) + 2 * len(region.keys)
    kept.encoder.encode([image, image, region])
    counts = kept.encoder.tile_cache.counts
    assert counts.avoided == len(image.keys), "the second of two equal images in a step"


def test_what_could_not_be_computed_is_not_kept(
    kept: ReferenceGAR, steps: list[list[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = kept.encoder
    expected = [rows.clone() for rows in encoder.encode(steps[0])]
    encoder.tile_cache.clear()

    def broken(*_: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "features", broken)
        with pytest.raises(MemoryError):
            encoder.encode(steps[0])
    for rows, before in zip(encoder.encode(steps[0]), expected, strict=True):
        assert torch.equal(rows, before)


def test_answers_and_counts_of_an_engine(mini: Path, picture: np.ndarray) -> None:
    requests = mixed_requests(picture)
    with garserve.load(mini, "reference", tile_cache_gb=0.1) as engine:
        once = tokens(engine, requests)
        computed = engine.tile_counts.computed
        assert tokens(engine, requests) == once
        assert engine.tile_counts.computed == computed
        assert engine.tile_counts.avoided > computed
    with garserve.load(mini, "reference") as engine:
        assert tokens(engine, requests) == once
        assert engine.tile_counts.hits == 0


@pytest.mark.vllm
def test_vllm_keeps_tiles_between_steps(vllm_engine: Engine, picture: np.ndarray) -> None:
    """vLLM's own encoder cache knows whole items only; another region of a known picture is a new item."""
    driver = vllm_engine.backend.driver  # type: ignore[attr-defined]
    vllm_engine.ask(picture, [{"box": [5, 5, 14, 20]}], "?", max_tokens=1)
    before = vllm_engine.tile_counts
    vllm_engine.ask(picture, [{"box": [110, 5, 119, 20]}], "?", max_tokens=1)
    after = vllm_engine.tile_counts
    tiles = len(vllm_engine.processor(RegionRequest(picture, [{"box": [5, 5, 14, 20]}], "?")).items[0].tiles)
    assert 0 < after.computed - before.computed < tiles
    assert after.asked - before.asked >= tiles
    model = driver.call(lambda engine: engine.model_executor.driver_worker.get_model())
    pool = model.encoder.tile_cache._pool
    driver.call(lambda engine: engine.collective_rpc("reload_weights"))
    assert not model.encoder.tile_cache._slots
    assert model.encoder.tile_cache._pool is pool  # memory that vLLM has counted
