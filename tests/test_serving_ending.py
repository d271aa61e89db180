"""How a server ends: answers that may finish, those that are cut off, and an engine that is not waited for."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.served import data_url, served

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

DESCRIBE = "/v1/regions/describe"


class Engine:
    """vLLM's engine client as far as a server's end is concerned; requests are names, and answers never end."""

    errored = False

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(shutdown_timeout=600)
        self.output_processor = SimpleNamespace(request_states={})
        self.aborted: list[str] = []
        self.on_abort: Callable[[str], Any] = lambda name: None

    async def abort(self, names: list[str], *, internal: bool) -> None:
        assert internal
        for name in names:
            del self.output_processor.request_states[name]
            self.aborted.append(name)
            self.on_abort(name)


def server(drain_seconds: float) -> SimpleNamespace:
    """A server's lifecycle with what it acts on: engine, admission and uvicorn's server."""
    from garserve.serving.admission import Admission
    from garserve.serving.lifecycle import Lifecycle
    from garserve.serving.settings import Settings

    own = SimpleNamespace(settings=Settings(drain_seconds=drain_seconds), admission=Admission(9), engine=Engine())
    uvicorn = SimpleNamespace(should_exit=False, force_exit=False)
    lifecycle = Lifecycle(own, SimpleNamespace(server=uvicorn))  # type: ignore[arg-type]
    return SimpleNamespace(life=lifecycle, uvicorn=uvicorn, admission=own.admission, engine=own.engine)


def ask(it: SimpleNamespace, name: str) -> None:
    """Bring a request into work and into the engine."""
    it.admission.enter()
    it.engine.output_processor.request_states[name] = None


def leaves(it: SimpleNamespace) -> Callable[[str], None]:
    return lambda name: it.admission.leave()


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


async def until_stopped(it: SimpleNamespace) -> None:
    while not it.uvicorn.should_exit:
        await asyncio.sleep(0.01)


def test_answers_that_finish_are_waited_for() -> None:
    async def story() -> None:
        it = server(600)
        ask(it, "a")
        it.life.end()
        await asyncio.sleep(0.2)
        assert not it.uvicorn.should_exit
        it.admission.leave()
        await until_stopped(it)
        assert not it.uvicorn.force_exit
        assert (it.engine.aborted, it.engine.vllm_config.shutdown_timeout) == ([], 600)

    run(story)


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.1, 1), (0, 1), (600, 2)], ids=["drained", "none", "twice"])
def test_answers_that_do_not_finish_are_cut_off(drain_seconds: float, signals: int) -> None:
    async def story() -> None:
        it = server(drain_seconds)
        it.engine.on_abort = leaves(it)
        ask(it, "a")
        ask(it, "b")
        for _ in range(signals):
            it.life.end()
            await asyncio.sleep(0)
        await until_stopped(it)
        assert it.engine.aborted == ["a", "b"]
        assert it.admission.in_work == 0
        assert it.uvicorn.force_exit
        assert it.engine.vllm_config.shutdown_timeout <= 5, "the engine, which has nothing to do, is waited for"

    run(story)


def test_what_comes_to_the_engine_late_is_cut_off_too() -> None:
    async def story() -> None:
        it = server(0)
        it.engine.on_abort = leaves(it)
        it.admission.enter()  # its image is still being read
        it.life.end()
        await asyncio.sleep(0.2)
        assert not it.uvicorn.should_exit
        it.engine.output_processor.request_states["late"] = None
        await until_stopped(it)
        assert it.engine.aborted == ["late"]

    run(story)


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_that_does_not_end_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    from garserve.serving import lifecycle

    monkeypatch.setattr(lifecycle, "_LAST_WORDS_SECONDS", 0.3)

    async def story() -> None:
        it = server(0)
        if fails:
            it.engine.output_processor = None
        it.admission.enter()
        it.life.end()
        await until_stopped(it)
        assert it.uvicorn.force_exit
        assert it.engine.vllm_config.shutdown_timeout <= 5

    run(story)


def test_a_third_signal_waits_for_no_last_words() -> None:
    async def story() -> None:
        it = server(600)
        ask(it, "a")
        for expected in (False, False, True):
            it.life.end()
            await asyncio.sleep(0)
            assert it.uvicorn.force_exit is expected
        assert it.engine.vllm_config.shutdown_timeout <= 5

    run(story)


def test_a_signal_while_connections_are_waited_for() -> None:
    async def story() -> None:
        it = server(600)
        it.life.end()
        await until_stopped(it)
        assert not it.uvicorn.force_exit
        it.life.end()
        while not it.uvicorn.force_exit:
            await asyncio.sleep(0.01)

    run(story)


def endless(**fields: Any) -> dict[str, Any]:
    """A description that goes on for long: boxes that are all different, and many words at random for each."""
    boxes = [{"box": [n, n % 300, n + 40, n % 300 + 40]} for n in range(250)]
    return {"image": data_url(), "regions": boxes, "max_tokens": 300, "temperature": 2.0, **fields}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "not within the bound"
        time.sleep(0.05)


@pytest.mark.vllm
@pytest.mark.parametrize(("drain_seconds", "signals"), [(1, 1), (600, 2)], ids=["a short drain", "two signals"])
def test_a_server_says_what_it_cuts_off_and_ends(tmp_path: Path, drain_seconds: int, signals: int) -> None:
    options = ["--drain-seconds", str(drain_seconds), "--request-seconds", "0"]
    with served(tmp_path, *options) as running, contextlib.ExitStack() as stack:
        stream = stack.enter_context(running.http.stream("POST", DESCRIBE, json=endless(stream=True), timeout=300))
        lines = stream.iter_lines()
        next(lines)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        whole = pool.submit(lambda: httpx.post(running.url + DESCRIBE, json=endless(), timeout=300))
        until(lambda: running.http.get("/load").json() == {"server_load": 2})
        for _ in range(signals):
            running.process.send_signal(signal.SIGTERM)
            until(lambda: any(line["event"] == "draining" for line in running.lines()))
        pieces = [line[6:] for line in lines if line.startswith("data: ")]
        assert json.loads(pieces[-2])["error"]["code"] == "cut_off"
        assert pieces[-1] == "[DONE]"
        answer = whole.result(300)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cut_off")
        assert running.process.wait(300) == 0, running.log.read_text()[-3000:]
