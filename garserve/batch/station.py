"""One engine that answers bundles for whoever asks, from several threads at a time: a node of a cluster has it."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from garserve.batch.bundles import Bundle
from garserve.batch.feeder import AHEAD, Arrival, WorkFound
from garserve.batch.job import Job
from garserve.batch.limits import Halt, Limits
from garserve.batch.pool import WorkerPool
from garserve.batch.prepare import Preparation
from garserve.batch.record import id_text
from garserve.engine import Engine
from garserve.errors import GarserveError

_POLL_SECONDS = 0.5


class Station:
    """Runs a job without an end, whose input are the bundles of calls and whose output are the calls' results."""

    def __init__(
        self,
        preparation: Preparation,
        open_engine: Callable[[], Engine],
        *,
        limits: Limits | None = None,
        workers: int = 0,
    ) -> None:
        """Start the engine, and workers that prepare for it; an error of the engine's start is raised here.

        Of the limits, `max_errors` is for whoever writes the rows of all stations to count.
        """
        endless = replace(limits or Limits(), max_errors=None)
        self._pool = WorkerPool(preparation, workers)
        self._preparing = threading.Lock()
        self._desk = _Desk()
        self._room = threading.Semaphore(AHEAD)
        self._ready: deque[Engine] = deque([open_engine()])
        self._job = Job(lambda: self._ready.pop() if self._ready else open_engine(), self._desk, limits=endless)
        self._job.events.put(WorkFound())
        self._thread = threading.Thread(target=self._run, name="garserve-station", daemon=True)
        self._thread.start()

    def answer(self, bundles: Sequence[Bundle]) -> list[dict[str, Any]]:
        """Return a row for each record that is wanted, in the order of the answers.

        Raises GarserveError where the engine has died more often than it is started again.
        """
        call = _Call()
        for bundle in bundles:
            for record, wanted in zip(bundle.records, bundle.wanted, strict=True):
                if wanted:
                    self._desk.expect(id_text(record.key), call)
        if not call.expected:
            return []
        with self._preparing:
            for prepared in self._pool.parcels(iter(bundles), lambda: self._desk.reason is not None):
                while not self._room.acquire(timeout=_POLL_SECONDS):
                    self._desk.check()
                self._job.events.put(Arrival(prepared))
        while not call.done.wait(_POLL_SECONDS):
            self._desk.check()
        return call.rows

    @property
    def numbers(self) -> dict[str, float]:
        """What the engine has done so far, for totals."""
        totals = self._job.totals
        numbers: dict[str, float] = {"worker_deaths": self._pool.deaths, "engine_restarts": totals.engine_restarts}
        numbers |= {"idle_seconds": totals.idle_seconds, "seconds": totals.elapsed()}
        tiles, computed = totals.tiles, totals.tiles_computed
        if (engine := self._job.engine) is not None:
            counts = engine.tile_counts
            tiles, computed = tiles + counts.asked, computed + counts.computed
        return {**numbers, "tiles": tiles, "tiles_computed": computed}

    def close(self) -> None:
        """Stop the engine and the workers."""
        self._job.stop.tell("closed", Halt.now)
        self._thread.join()
        self._pool.close()

    def _run(self) -> None:
        try:
            self._job.run(self)
        except BaseException as error:  # handed to the calls; some of vLLM's checks raise SystemExit
            self._job.stop.tell(f"{error}", Halt.now)
        finally:
            self._desk.close(self._job.stop.reason or "the engine has stopped")

    def start(self) -> None:
        """Calls begin by themselves."""

    def taken(self) -> None:
        """Let another arrival in."""
        self._room.release()

    def stop(self) -> None:
        """Calls see by themselves that the job is over."""


class _Call:
    """Rows of one call."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.expected = 0
        self.done = threading.Event()


class _Desk:
    """Hands rows to the calls that wait for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[_Call]] = {}
        self.reason: str | None = None

    def expect(self, key: str, call: _Call) -> None:
        with self._lock:
            call.expected += 1
            self._waiting.setdefault(key, deque()).append(call)

    def append(self, row: dict[str, Any]) -> None:
        key = id_text(row["id"])
        with self._lock:
            calls = self._waiting[key]
            call = calls.popleft()
            if not calls:
                del self._waiting[key]
            call.rows.append(row)
            if len(call.rows) == call.expected:
                call.done.set()

    def sync(self, *, force: bool = True) -> None:
        pass

    def check(self) -> None:
        if self.reason is not None:
            raise GarserveError(self.reason)

    def close(self, reason: str) -> None:
        self.reason = reason
