"""GAR in vLLM under other engine options: the tokens stay the reference's."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import garserve
from garserve.engine import Engine
from garserve.errors import GarserveError, RequestError
from garserve.vllm_plugin.arguments import worker_arguments
from tests.requests_mix import mixed_requests, tokens

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm


def test_equal_with_chunked_prefill_of_64_tokens(mini: Path, reference: Engine, picture: np.ndarray) -> None:
    requests = mixed_requests(picture)
    with garserve.load(mini, "vllm", max_num_batched_tokens=64, max_num_seqs=8) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)


def test_equal_with_the_engine_in_a_process_of_its_own(mini: Path, reference: Engine, picture: np.ndarray) -> None:
    requests = [*mixed_requests(picture), *mixed_requests(picture)]
    other = garserve.RegionRequest(picture[::-1].copy(), [garserve.Region.from_box([3, 3, 30, 40])], max_tokens=8)
    with garserve.load(mini, "vllm", separate_process=True) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)
        with pytest.raises(RequestError, match="refused by vLLM"):
            engine.ask(other.image, other.regions, "word " * 200_000)
        assert tokens(engine, [other]) == tokens(reference, [other])  # its items were never sent for the refused one
        _lose_the_process(engine)
    with pytest.raises(GarserveError, match="the engine has stopped"):
        next(engine.describe_many(requests))


def _lose_the_process(engine: Engine) -> None:
    """Kill the engine's process while it is asked for something, which is then told so, as is whoever asks next."""
    (process,) = [one for one in multiprocessing.active_children() if one.name.startswith("EngineCore")]
    assert process.pid is not None
    assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()  # its worker is in it
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while _state(process.pid) != "T":
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.01)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: engine.tile_counts)
        time.sleep(1)
        assert not asked.done()
        process.kill()
        with pytest.raises(GarserveError, match="its process died"):
            asked.result(30)


def _state(pid: int) -> str:
    """The state of a process's first thread, which steps the engine: T where it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_has_a_process_of_its_own_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if not current_platform.is_cpu():
        pytest.skip("a GPU's only worker runs in its engine's process by itself")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    chosen = worker_arguments({"tensor_parallel_size": 1})
    asked = SimpleNamespace(parallel_config=SimpleNamespace(**chosen))
    assert Executor.get_class(asked) is UniProcExecutor  # type: ignore[arg-type]
    assert worker_arguments({"tensor_parallel_size": 2}) == worker_arguments({"data_parallel_size": 2}) == {}
    assert worker_arguments({"distributed_executor_backend": "mp"}) == {}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert worker_arguments({}) == {}


@pytest.mark.parametrize(("reason", "kind"), [("abort", GarserveError), ("error", RequestError)])
def test_what_vllm_ends_by_itself_is_no_answer(reason: str, kind: type[GarserveError]) -> None:
    """As where Ctrl-C reaches the engine's process first."""
    from garserve.vllm_plugin.requests import Requests, _Running

    completion = SimpleNamespace(token_ids=[5, 6], finish_reason=reason, logprobs=None)
    output = SimpleNamespace(request_id="0", finished=True, outputs=[completion], num_cached_tokens=0)
    requests, reports = Requests(SimpleNamespace()), []  # type: ignore[arg-type]
    requests._running = {"0": _Running(reports.append)}
    requests.report([output])
    assert [type(report) for report in reports] == [kind]
    assert requests._running == {}


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


@pytest.mark.parametrize(
    ("tiles", "prefixes"), [(0, True), (20, False)], ids=["no room", "hardly any room, and no prefix cache"]
)
def test_equal_with_no_or_hardly_any_room_for_tiles(
    mini: Path, reference: Engine, picture: np.ndarray, tiles: int, prefixes: bool
) -> None:
    requests = [*mixed_requests(picture), *reversed(mixed_requests(picture))]
    config = reference.processor.config
    room = (tiles + 0.5 * (tiles > 0)) * config.tokens_per_tile * config.hidden_size * 4 / 1e9
    options: dict[str, Any] = {"tile_cache_gb": room, "max_num_seqs": 2, "enable_prefix_caching": prefixes}
    with garserve.load(mini, "vllm", **options) as engine:
        assert tokens(engine, requests) == tokens(reference, requests)
        counts = engine.tile_counts
    assert counts.computed == counts.misses > 0
    assert (counts.hits > 0) == (counts.evicted > 0) == (tiles > 0)


def test_processes_that_vllm_starts_are_as_quiet_as_asked() -> None:
    """They are told by the environment, and speak before they have read it."""
    code = "import garserve, logging; print(logging.getLogger('vllm').level)"
    for level, expected in (("ERROR", logging.ERROR), ("INFO", logging.NOTSET)):
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": level}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout == f"{expected}\n"
