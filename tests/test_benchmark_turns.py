"""What benchmarks/batch.py and load.py hold against each other: warmed alike and in turns; nothing is timed."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from PIL import Image

import garserve
from garserve.batch.pool import WorkerPool
from garserve.batch.prepare import Preparation
from garserve.checkpoint import TINY, resolve
from garserve.engine import Engine
from garserve.model.tile_cache import TileCounts
from tests.conftest import ROOT

SIZE = (120, 90)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the benchmarks on the path, as one of its scripts has it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_batch_and_loop_are_timed_warm_and_with_nothing_prepared(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import batch_memory
    import warm_runs

    events: list[str] = []

    class Noting(batch_memory.InstantBackend):
        def submit(self, *given: Any) -> Any:
            events.append("ask")
            return super().submit(*given)

        def tile_counts(self) -> TileCounts:
            return TileCounts(asked=events.count("ask"), computed=1)

        def close(self) -> None:
            events.append("close")

    def load(**_: Any) -> Engine:
        events.append("load")
        return Engine(Noting(), Preparation(str(resolve(TINY))).processor())

    def give(pool: WorkerPool, worker: Any, task: Any) -> None:
        events.append(f"prepare {Path(task.bundle.records[0].image).name}")
        given(pool, worker, task)

    given = WorkerPool._give
    monkeypatch.setattr(WorkerPool, "_give", give)
    monkeypatch.setattr(garserve, "load", load)
    Image.new("RGB", SIZE).save(tmp_path / "one.png")
    lines = [{"id": n, "image": str(tmp_path / "one.png"), "regions": [{"box": [5, 5, 20 + n, 30]}]} for n in range(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = warm_runs.Data(tmp_path / "in.jsonl", {0: {}, 1: {}})

    run = warm_runs.run_batch(data, tmp_path / "out.jsonl", (1, 0.1), 32, 1)
    assert events == ["load", "ask", "prepare coffee.jpg", "prepare one.png", "ask", "ask", "close"]
    assert (run.totals.regions, run.totals.tiles, run.totals.tiles_computed) == (2, 2, 0)  # none of what warmed

    events.clear()
    loop = warm_runs.run_loop(data, [0, 1], 32)
    assert events == ["load", "ask", "ask", "ask", "close"]
    assert loop.texts == run.texts


def test_server_and_engine_take_turns(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    import load

    events: list[str] = []

    class Direct(nullcontext[Any]):
        def __enter__(self) -> "Direct":
            return self

        def describe_many(self, requests: list[Any], **_: Any) -> Iterator[Any]:
            events.append(f"engine {len(requests)}")
            yield from (SimpleNamespace(text="said") for _ in requests)

    async def served(url: str, asks: Any, texts: list[str], work: list[int], clients: int) -> float:
        assert texts == ["said"] * 3
        events.append(f"server {len(work)}")
        return 1.0

    monkeypatch.setattr(garserve, "load", lambda *_, **__: Direct())
    monkeypatch.setattr(load, "runtime", lambda engine: SimpleNamespace(tower="torch"))
    monkeypatch.setattr(load, "_served", served)
    asks = load.make_asks(random.Random(0), 3, 8)
    texts, ratios, tower = load._overhead("url", asks, 5, 2, 3)
    assert (texts, len(ratios), tower) == (["said"] * 3, 3, "torch")
    assert events == ["engine 3", "server 3", *["engine 5", "server 5"] * 3]  # both warm, then in turns


@pytest.mark.parametrize(("status", "wrong"), [(200, []), (503, ["early: 503"])])
def test_a_client_that_leaves_early_looks_at_the_status(
    scripts: None, monkeypatch: pytest.MonkeyPatch, status: int, wrong: list[str]
) -> None:
    pytest.importorskip("aiohttp")
    import load

    class Response:
        content = SimpleNamespace(readany=AsyncMock())
        close = Mock()

        def __init__(self) -> None:
            self.status = status

    @asynccontextmanager
    async def post(*_: Any) -> AsyncIterator[Response]:
        yield Response()

    monkeypatch.setattr(load, "_post", post)
    tally = load.Tally()
    asyncio.run(load._early(Mock(), "url", load.make_asks(random.Random(0), 1, 8)[0], tally))
    assert (tally.wrong, tally.outcomes) == (wrong, {"early": 1})
    Response.content.readany.assert_awaited_once()
    Response.close.assert_called_once()


def test_the_load_says_what_it_repeats(scripts: None) -> None:
    pytest.importorskip("aiohttp")
    import load

    said = load._conditions(64, 3)
    assert "60 different requests, each asked before: tile and prefix caches are warm" in said
    assert "server over engine the median of 3 rounds" in said
    assert load._percentiles([]) == {}
