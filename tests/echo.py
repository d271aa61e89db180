"""A backend that answers at once, with tokens that depend on everything of a request: it tests what is around it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from garserve.engine import Engine
from garserve.errors import GarserveError
from garserve.generation import OnReport, Progress, Sampling
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.model.tile_cache import TileCounts


class EchoBackend:
    """Says four tokens that are a hash of the prompt and its items; `dies_after` so many requests, as an engine may."""

    name = "echo"

    def __init__(self, *, dies_after: int | None = None, seconds: float = 0.0) -> None:
        self._left, self._seconds = dies_after, seconds
        self.submitted = 0
        self._lock = threading.Lock()

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        self.submitted += 1
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                on_report(GarserveError("the engine has stopped: EngineDeadError"))
                return lambda: None
        time.sleep(self._seconds)
        digest = blake3(str(prepared.token_ids).encode())
        for item in prepared.items:
            digest.update(item.hash.encode())
        on_report(Progress([40 + byte % 80 for byte in digest.digest(4)], "length"))
        return lambda: None

    def tile_counts(self) -> TileCounts:
        return TileCounts(asked=4, computed=1)

    def token_room(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def echo_engine(checkpoint: Path, backend: EchoBackend | None = None) -> Engine:
    from garserve.config import read_config

    return Engine(backend or EchoBackend(), Processor(checkpoint, read_config(checkpoint)))


def shared(engine: Engine) -> Engine:
    """Return an engine that a job may close while others go on using it."""
    return Engine(_Unclosed(engine.backend), engine.processor)


class _Unclosed:
    def __init__(self, backend: object) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def close(self) -> None:
        pass
