"""The tiny checkpoint inside the package: it tells the truth, by all its parts, and in vLLM says the same words."""

from collections.abc import Iterator

import pytest

import garserve
from garserve.checkpoint import TINY, resolve
from garserve.engine import Engine
from garserve.evaluation.ablation import without
from garserve.evaluation.part import Part
from garserve.evaluation.questions import read_questions
from garserve.evaluation.run import Evaluation, evaluate

QUESTIONS = 400
# (attribute, at least so many of 100 in scenes, in photographs): of all forms of question together.
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


def test_every_part_is_needed(tiny: Engine) -> None:
    questions = read_questions(limit=100)
    whole = evaluate(tiny, questions).accuracy().share
    for part in Part:
        with without(part, tiny) as engine:
            assert evaluate(engine, questions).accuracy().share < whole - 0.15, part
    assert evaluate(tiny, questions).accuracy().share == whole


@pytest.mark.vllm
def test_vllm_says_what_the_reference_says(on_reference: Evaluation) -> None:
    """Greedy: the same text from both for each question, so the same accuracy."""
    with garserve.load() as engine:
        on_vllm = evaluate(engine, read_questions(limit=QUESTIONS))
        counts = engine.tile_counts
    assert len(on_vllm.judged) == QUESTIONS
    assert [one.text for one in on_vllm.judged] == [one.text for one in on_reference.judged]
    assert counts.avoided > 0
