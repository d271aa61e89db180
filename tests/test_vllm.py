"""GAR in vLLM: equal to the reference, sharing what may be shared and nothing else, by vLLM's own counters."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import garserve
from garserve.engine import Engine
from garserve.errors import GarserveError, RequestError
from garserve.inputs.request import RegionRequest
from tests.requests_mix import REGIONS, mixed_requests, tokens

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

BLOCK = 128  # tokens of a KV block on the CPU: prefix hits come in steps of it


def test_equal_to_the_reference(vllm_engine: Engine, reference: Engine, picture: np.ndarray) -> None:
    requests = mixed_requests(picture)
    expected = tokens(reference, requests)
    assert tokens(vllm_engine, requests) == expected
    assert len({tuple(ids[:6]) for ids in expected}) > len(expected) // 2, "these requests tell nothing apart"


class Watch:
    """Counts the items that the model encodes, in vLLM's own call to it, and lists vLLM's encoder cache."""

    def __init__(self, engine: Engine) -> None:
        self.driver = engine.backend.driver  # type: ignore[attr-defined]
        self.items: list[int] = []  # tiles of each item encoded
        model = self.driver.call(lambda e: e.model_executor.driver_worker.get_model())
        self._encoder, self._original = model.encoder, model.encoder.forward

    def __enter__(self) -> "Watch":
        def encode(items: list[Any]) -> Any:
            self.items += [0 if item.roi else len(item.tiles) for item in items]
            return self._original(items)

        self._encoder.forward = encode
        return self

    def __exit__(self, *_: object) -> None:
        del self._encoder.forward

    @property
    def held(self) -> set[str]:
        """Hashes of the items whose embeddings vLLM's encoder cache holds."""
        return set(self.driver.call(lambda e: e.engine_core.engine_core.scheduler.encoder_cache_manager.cached))

    @property
    def images(self) -> int:
        return sum(tiles > 0 for tiles in self.items)

    @property
    def regions(self) -> int:
        return sum(tiles == 0 for tiles in self.items)

    def clear_caches(self) -> None:
        """Forget KV blocks and encoder outputs, as after a start."""
        self.driver.call(lambda e: (e.reset_prefix_cache(), e.reset_encoder_cache()))
        self.items.clear()


@pytest.fixture
def watch(vllm_engine: Engine) -> Iterator[Watch]:
    with Watch(vllm_engine) as watch:
        watch.clear_caches()
        yield watch


def test_same_regions_other_question_encodes_nothing_again(
    vllm_engine: Engine, watch: Watch, picture: np.ndarray
) -> None:
    first = vllm_engine.ask(picture, REGIONS, "What is <Prompt0>?", max_tokens=2)
    assert (watch.images, watch.regions) == (1, 3)
    assert first.cached_tokens <= _image_start(vllm_engine, picture)
    items = vllm_engine.processor(RegionRequest(picture, REGIONS, "?")).items
    assert {item.hash for item in items} == watch.held
    again = vllm_engine.ask(picture, REGIONS, "Where is it?", max_tokens=2)
    assert (watch.images, watch.regions) == (1, 3)
    shared = _common_prefix(
        vllm_engine,
        RegionRequest(picture, REGIONS, "What is <Prompt0>?"),
        RegionRequest(picture, REGIONS, "Where is it?"),
    )
    assert again.cached_tokens == shared // BLOCK * BLOCK > _image_start(vllm_engine, picture)


def test_another_region_of_the_same_set_reuses_the_image(
    vllm_engine: Engine, watch: Watch, picture: np.ndarray
) -> None:
    requests = [RegionRequest(picture, REGIONS, "What is this?", focus=[k], max_tokens=2) for k in range(3)]
    answers = [next(vllm_engine.describe_many([request])) for request in requests]
    assert (watch.images, watch.regions) == (1, 3)
    shared = _common_prefix(vllm_engine, *requests[:2])
    image_end = vllm_engine.processor(requests[0]).spans[0][1]
    assert shared >= image_end
    for answer in answers[1:]:
        assert answer.cached_tokens == shared // BLOCK * BLOCK > _image_start(vllm_engine, picture)


def test_other_mask_shares_nothing(vllm_engine: Engine, watch: Watch, picture: np.ndarray) -> None:
    vllm_engine.ask(picture, REGIONS[:2], "What is <Prompt0>?", max_tokens=2)
    other = vllm_engine.ask(picture, [REGIONS[0], REGIONS[2]], "What is <Prompt0>?", max_tokens=2)
    assert (watch.images, watch.regions) == (2, 4)
    assert other.cached_tokens <= _image_start(vllm_engine, picture)


def test_other_picture_with_the_same_mask_shares_nothing(
    vllm_engine: Engine, watch: Watch, picture: np.ndarray
) -> None:
    vllm_engine.ask(picture, REGIONS[:1], "?", max_tokens=2)
    other = vllm_engine.ask(255 - picture, REGIONS[:1], "?", max_tokens=2)
    assert (watch.images, watch.regions) == (2, 2)
    assert other.cached_tokens <= _image_start(vllm_engine, picture)


def test_cached_answers_equal_fresh_ones(vllm_engine: Engine, watch: Watch, picture: np.ndarray) -> None:
    requests = mixed_requests(picture)
    fresh = tokens(vllm_engine, requests)
    assert tokens(vllm_engine, requests) == fresh
    assert tokens(vllm_engine, requests[::-1])[::-1] == fresh


def _image_start(engine: Engine, picture: np.ndarray) -> int:
    """Tokens before the image: the system's turn, which every request shares."""
    return engine.processor(RegionRequest(picture, REGIONS[:1])).spans[0][0]


def _common_prefix(engine: Engine, one: RegionRequest, other: RegionRequest) -> int:
    a, b = engine.processor(one).token_ids, engine.processor(other).token_ids
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def test_a_prompt_longer_than_the_model_takes_is_an_error_not_a_crash(vllm_engine: Engine, picture: np.ndarray) -> None:
    long = RegionRequest(picture, REGIONS[:1], "word " * 12_000)
    with pytest.raises(RequestError, match=r"refused by vLLM: .*longer than the maximum model length"):
        next(vllm_engine.describe_many([long]))
    assert vllm_engine.ask(picture, REGIONS[:1], "Still there?", max_tokens=1).finish_reason == "length"


def test_a_second_engine_in_the_process_is_refused(vllm_engine: Engine, mini: Path, picture: np.ndarray) -> None:
    with pytest.raises(GarserveError, match="close it first, or load with separate_process=True"):
        garserve.load(mini, "vllm")
    assert vllm_engine.ask(picture, REGIONS[:1], "Still there?", max_tokens=1).finish_reason == "length"


def test_a_second_engine_with_a_process_of_its_own_leaves_the_first_alone(
    vllm_engine: Engine, mini: Path, picture: np.ndarray
) -> None:
    expected = vllm_engine.describe(picture, REGIONS[:1], max_tokens=4)
    with garserve.load(mini, "vllm", separate_process=True) as second:
        assert [one.name for one in multiprocessing.active_children() if one.name.startswith("EngineCore")]
        assert second.describe(picture, REGIONS[:1], max_tokens=4)[0].token_ids == expected[0].token_ids
    other = [{"box": [2, 3, 40, 50]}]  # of which nothing is kept yet
    assert vllm_engine.describe(picture, REGIONS[:1], max_tokens=4)[0].token_ids == expected[0].token_ids
    assert len(vllm_engine.describe(picture, other, max_tokens=4)[0].token_ids) == 4


def test_register_is_idempotent_and_lazy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from garserve.vllm_plugin.register import register; register(); register();"
        "from vllm import ModelRegistry; assert 'GARModel' in ModelRegistry.get_supported_archs();"
        "print('garserve.vllm_plugin.model' in sys.modules, 'garserve.model.vision' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip().splitlines()[-1] == "False False"
