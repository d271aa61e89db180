"""The tiny checkpoint inside the package: it tells the truth, by all its parts, and in vLLM says the same words."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import garserve
from garserve.checkpoint import TINY, resolve
from garserve.engine import Engine
from garserve.evaluation.ablation import without
from garserve.evaluation.part import Part
from garserve.evaluation.questions import read_questions
from garserve.evaluation.run import Evaluation, evaluate
from garserve.model.tile_cache import TileCache

QUESTIONS = 400
PICTURES = ("scenes_0001", "photographs_0004")  # those that kept tiles are tried on
TAUGHT = ("colour", "size", "position", "relation", "larger")


@pytest.fixture(scope="module")
def tiny() -> Iterator[Engine]:
    with garserve.load(backend="reference", batch_size=16, tile_cache_gb=0.1) as engine:
        yield engine


@pytest.fixture(scope="module")
def on_reference(tiny: Engine) -> Evaluation:
    return evaluate(tiny, read_questions(limit=QUESTIONS))


def test_it_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in resolve(TINY).iterdir()}
    assert files["model.safetensors"] <= 12_000_000
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)


def test_the_questions_are_of_every_kind() -> None:
    questions = read_questions()
    for split in ("scenes", "photographs"):
        for attribute in ("colour", "size", "position", "shape", "texture", "relation"):
            for form in ("free", "yes/no", "choice"):
                kind = (split, attribute, form)
                assert sum((one.split, one.attribute, one.form) == kind for one in questions) >= 30, kind
    assert len({one.request.id for one in questions}) == len(questions)


def test_it_tells_the_truth(on_reference: Evaluation) -> None:
    """Of the few questions asked here; MODEL_CARD.md has the figures of all."""
    for split in ("scenes", "photographs"):
        for attribute in TAUGHT:
            found = on_reference.accuracy(split, attribute)
            assert found.count >= 10, (split, attribute)
            assert (found.share or 0) >= 0.85, (split, attribute)


def test_every_part_is_needed(tiny: Engine) -> None:
    """To tell colour and size: without its mask a region is still found where it lies."""
    questions = [one for one in read_questions() if one.attribute in ("colour", "size")][::8]
    assert len(questions) > 50
    whole = evaluate(tiny, questions).accuracy().share
    for part in Part:
        with without(part, tiny) as engine:
            assert evaluate(engine, questions).accuracy().share < whole - 0.15, part
    assert evaluate(tiny, questions).accuracy().share == whole


def room_for(tiles: int, engine: Engine) -> float:
    """Gigabytes that hold so many tiles of the tiny checkpoint."""
    config = engine.processor.config
    return (tiles + 0.5) * config.tokens_per_tile * config.hidden_size * 4 / 1e9


def test_kept_tiles_change_no_answer(tiny: Engine) -> None:
    """Greedy texts with and without kept tiles, in a random order, with so little room that tiles go all the time."""
    questions = [one for one in read_questions() if Path(str(one.request.image)).stem in PICTURES]
    random.Random(0).shuffle(questions)
    texts, counts = [], []
    for tiles in (7, 0):
        options = {"batch_size": 16, "max_num_tiles": 4, "tile_cache_gb": room_for(tiles, tiny)}
        with garserve.load(TINY, "reference", **options) as engine:
            texts.append([one.text for one in evaluate(engine, questions).judged])
            counts.append(engine.tile_counts)
    assert len(questions) > 50
    assert texts[0] == texts[1]
    assert counts[0].evicted > 0
    assert counts[0].computed < counts[1].computed


def test_kept_tiles_are_bitwise_those_computed_anew(tiny: Engine) -> None:
    """Where a pass through the tower has always one tile; in other company a tile differs in the last bits."""
    encoder = tiny.backend.model.encoder  # type: ignore[attr-defined]
    processor = tiny.processor.variant(max_num_tiles=4)
    items = [processor(one.request).items for one in read_questions()[:24]]
    before = encoder.tiles_at_once, encoder.tile_cache
    encoder.tiles_at_once, rows = 1, []
    try:
        for cache in (TileCache(room_for(7, tiny)), TileCache(0)):
            encoder.tile_cache = cache
            rows.append([torch.cat(encoder.encode(some)) for some in items])
            assert (cache.counts.evicted > 0) == (cache.capacity > 0)
            assert (cache.counts.hits > 0) == (cache.capacity > 0)
    finally:
        encoder.tiles_at_once, encoder.tile_cache = before
    assert all(torch.equal(kept, anew) for kept, anew in zip(*rows, strict=True))


@pytest.mark.vllm
def test_vllm_says_what_the_reference_says(on_reference: Evaluation) -> None:
    """Greedy: the same text from both for each question, so the same accuracy."""
    with garserve.load() as engine:
        on_vllm = evaluate(engine, read_questions(limit=QUESTIONS))
        counts = engine.tile_counts
    assert len(on_vllm.judged) == QUESTIONS
    assert [one.text for one in on_vllm.judged] == [one.text for one in on_reference.judged]
    assert counts.avoided > 0
