"""The thread that drives vLLM's engine, over engines that compute nothing."""

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from garserve.engine import Engine
from garserve.errors import GarserveError, InputError, RequestError
from garserve.generation import Progress, Report, Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.inputs.request import RegionRequest
from tests.requests_mix import REGIONS

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

SAMPLING = Sampling(stop_id=1, max_tokens=4)


class _Idle:
    """An engine that is asked for nothing."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.engine_core = SimpleNamespace(shutdown=self.closed.set)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=False))

    def has_unfinished_requests(self) -> bool:
        return False


def _backend(monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Any]) -> Callable[[], Any]:
    from garserve.vllm_plugin import backend, driver

    monkeypatch.setattr(backend, "engine_arguments", lambda *_, **__: {})
    monkeypatch.setattr(driver, "_make_engine", make_engine)
    checkpoint: Any = SimpleNamespace(folder=Path("folder"), config=None)
    return partial(backend.VLLMBackend, checkpoint)


class _Interrupted:
    """An engine's start in which Ctrl-C is pressed, and which then waits to be told to end; the next ones do not."""

    def __init__(self) -> None:
        self.engine: _Idle | None = None  # what the start ends with; None fails
        self._thread: threading.Thread | None = None
        self._goes_on = threading.Event()

    def __call__(self, *_: Any) -> _Idle:
        if self._thread is not None:
            return _Idle()
        self._thread = threading.current_thread()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        assert self._goes_on.wait(60)
        if self.engine is None:
            raise RuntimeError("no memory")
        return self.engine

    def end(self) -> None:
        """Let the start end, and wait for the end of its thread."""
        self._goes_on.set()
        assert self._thread is not None
        self._thread.join(60)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as a shell's foreground has it: a job in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_engine_whose_start_was_interrupted_is_closed_when_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = _Interrupted()
    start.engine = _Idle()
    load = _backend(monkeypatch, start)
    with pytest.raises(KeyboardInterrupt):
        load()
    try:
        with pytest.raises(GarserveError, match="is starting in this process"):
            load()
    finally:
        start.end()
    assert start.engine.closed.is_set()
    load = _backend(monkeypatch, lambda *_: _Idle())
    again = load()
    with pytest.raises(GarserveError, match="close it first"):
        load()
    again.close()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_start_that_fails_leaves_the_process_free(monkeypatch: pytest.MonkeyPatch) -> None:
    start = _Interrupted()
    with pytest.raises(KeyboardInterrupt):
        _backend(monkeypatch, start)()
    start.end()
    _backend(monkeypatch, lambda *_: _Idle())().close()


@pytest.mark.parametrize("size", [2, "2", 0])
def test_an_engine_of_several_replicas_is_refused(monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    load = _backend(monkeypatch, lambda *_: pytest.fail("it was started"))
    for apart in (False, True):
        with pytest.raises(
            RequestError, match=r"data_parallel_size: expected 1, .*--engines N.*--data-parallel-size N"
        ):
            load(separate_process=apart, data_parallel_size=size)


class _Apart:
    """The two ends of an engine in a process of its own: vLLM's caches of items on both sides, and no model."""

    def __init__(self, room: int) -> None:
        from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache

        config: Any = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=room / 2**30))
        self.sender, self.receiver = LruKeyReplicatedSenderCache(config), LruKeyReplicatedReceiverCache(config)
        self.renderer = SimpleNamespace(mm_processor_cache=self.sender)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.refuses = False
        self.sent: list[set[str]] = []  # hashes of the items that came with each request
        self.waiting: list[SimpleNamespace] = []

    def add_request(self, number: str, prompt: Any, _: Any) -> str:
        if self.refuses:
            raise ValueError("longer than the maximum model length")
        hashes, items = prompt["mm_hashes"]["image"], list(prompt["mm_kwargs"]["image"])
        self.sent.append({name for name, item in zip(hashes, items, strict=True) if item is not None})
        self.waiting.append(SimpleNamespace(number=number, missing=self._receive(hashes, items)))
        return f"{number}-in-the-engine"

    def _receive(self, hashes: list[str], items: list[Any]) -> list[str]:
        from vllm.multimodal.cache.base import MultiModalCacheMissError

        features: list[Any] = [
            SimpleNamespace(mm_hash=name, identifier=name, data=item) for name, item in zip(hashes, items, strict=True)
        ]
        try:
            self.receiver.get_and_update_features(features)
        except MultiModalCacheMissError as error:
            return error.mm_hashes
        return []

    def abort_request(self, *_: Any, **__: Any) -> None:
        pass

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        """As LLMEngine's: what the receiver lacks is forgotten by the sender, and the request ends with "error"."""
        request = self.waiting.pop(0)
        for name in request.missing:
            self.sender.invalidate(name)
        reason, ids = ("error", []) if request.missing else ("stop", [1])
        completion = SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=None)
        return [SimpleNamespace(request_id=request.number, finished=True, outputs=[completion], num_cached_tokens=0)]


class _Client:
    """Asks an EngineDriver over an _Apart, one request at a time."""

    def __init__(self, driver: Any, engine: _Apart) -> None:
        self._driver, self.engine = driver, engine

    def ask(self, prepared: PreparedRequest) -> Report:
        reports: list[Report] = []
        told = threading.Event()

        def report(one: Report) -> None:
            reports.append(one)
            told.set()

        self._driver.submit(prepared, SAMPLING, report)
        assert told.wait(60)
        (only,) = reports
        return only

    def refused(self, prepared: PreparedRequest) -> None:
        self.engine.refuses = True
        assert isinstance(self.ask(prepared), InputError)
        self.engine.refuses = False

    def answered(self, prepared: PreparedRequest) -> set[str]:
        """Ask, expect an answer, and return the hashes of the items that were sent for it."""
        self.engine.sent.clear()
        report = self.ask(prepared)
        assert isinstance(report, Progress), report
        return set().union(*self.engine.sent)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], _Client]]:
    """Makes a client of an engine that holds items of so many bytes."""
    from garserve.vllm_plugin import driver

    drivers = []

    def make(room: int) -> _Client:
        engine = _Apart(room)
        monkeypatch.setattr(driver, "_make_engine", lambda *_: engine)
        drivers.append(driver.EngineDriver({}))
        return _Client(drivers[-1], engine)

    yield make
    for one in drivers:
        one.close()


def _names(prepared: PreparedRequest) -> set[str]:
    return {item.hash for item in prepared.items}


def test_items_of_a_refused_request_that_the_engine_has_are_not_sent_again(
    apart: Callable[[int], _Client], reference: Engine, picture: np.ndarray
) -> None:
    first = reference.processor(RegionRequest(picture, REGIONS[:1]))
    other = reference.processor(RegionRequest(picture[::-1].copy(), REGIONS[:1]))
    client = apart(2**30)
    assert client.answered(first) == _names(first)
    client.refused(first)
    assert client.answered(first) == set()
    client.refused(other)
    assert client.answered(other) == _names(other)


def test_a_request_is_sent_once_more_where_the_engine_let_go_of_its_items(
    apart: Callable[[int], _Client], reference: Engine, picture: np.ndarray
) -> None:
    from vllm.multimodal.cache.base import MultiModalCache

    from garserve.vllm_plugin.items import MODALITY, engine_input

    one, two, three = (
        reference.processor(RegionRequest(np.roll(picture, turn, axis=1), REGIONS[:1])) for turn in range(3)
    )
    size = sum(MultiModalCache.get_item_size(item) for item in engine_input(one)["mm_kwargs"][MODALITY] if item)
    client = apart(int(2.5 * size))
    client.answered(one)
    client.answered(two)
    client.refused(one)  # the client takes it for the one used last, and the engine knows nothing of it
    client.answered(three)
    missing = client.answered(one)
    assert missing
    assert client.engine.sent == [set(), missing]
    assert client.answered(one) == set()


def test_an_error_of_a_request_that_was_sent_whole_is_its_end(
    apart: Callable[[int], _Client], reference: Engine, picture: np.ndarray
) -> None:
    prepared = reference.processor(RegionRequest(picture, REGIONS[:1]))
    client = apart(2**30)
    client.engine._receive = lambda *_: ["another"]  # type: ignore[method-assign]
    for sent in (1, 3):  # the second one lacks its items, and so is asked twice
        report = client.ask(prepared)
        assert isinstance(report, RequestError)
        assert "gave this request up" in str(report)
        assert len(client.engine.sent) == sent
