"""GAR in vLLM under other engine options: the tokens stay the reference's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import garserve
from garserve.engine import Engine
from garserve.errors import GarserveError, RequestError
from tests.requests_mix import mixed_requests, tokens

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64, "max_num_seqs": 8},
        {"enable_prefix_caching": False, "max_num_seqs": 2},
    ],
    ids=["chunked prefill of 64 tokens", "no prefix cache"],
)
def test_equal_under_other_engine_options(
    mini: Path, reference: Engine, picture: np.ndarray, options: dict[str, Any]
) -> None:
    requests = mixed_requests(picture)
    with garserve.load(mini, "vllm", **options) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)


def test_equal_with_the_engine_in_a_process_of_its_own(mini: Path, reference: Engine, picture: np.ndarray) -> None:
    requests = [*mixed_requests(picture), *mixed_requests(picture)]
    with garserve.load(mini, "vllm", separate_process=True) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)


def test_equal_with_the_decoder_on_two_ranks(mini: Path, reference: Engine, picture: np.ndarray) -> None:
    requests = mixed_requests(picture)
    with garserve.load(mini, "vllm", separate_process=True, tensor_parallel_size=2) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)
        assert engine.tile_counts.avoided > 0


def test_an_engine_that_cannot_start_says_why_and_leaves_the_process_free(mini: Path, picture: np.ndarray) -> None:
    with pytest.raises(GarserveError, match=r"vLLM did not start \("):
        garserve.load(mini, "vllm", max_model_len=10**9)
    with garserve.load(mini, "vllm", max_model_len=4096) as engine:
        assert tokens(engine, mixed_requests(picture)[:1])


def test_unknown_engine_option(mini: Path) -> None:
    with pytest.raises(RequestError, match="engine option 'max_modle_len' is none of vLLM's"):
        garserve.load(mini, "vllm", max_modle_len=3)


@pytest.mark.parametrize("tiles", [0, 20])
def test_equal_with_no_or_hardly_any_room_for_tiles(
    mini: Path, reference: Engine, picture: np.ndarray, tiles: int
) -> None:
    requests = [*mixed_requests(picture), *reversed(mixed_requests(picture))]
    config = reference.processor.config
    room = (tiles + 0.5 * (tiles > 0)) * config.tokens_per_tile * config.hidden_size * 4 / 1e9
    with garserve.load(mini, "vllm", tile_cache_gb=room, max_num_seqs=2) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)
        counts = engine.tile_counts
    assert counts.computed == counts.misses > 0
    assert (counts.hits > 0) == (counts.evicted > 0) == (tiles > 0)
