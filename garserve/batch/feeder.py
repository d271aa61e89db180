"""The thread ahead of the engine: reads records, leaves out what is answered, has the others prepared, and waits."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from garserve.batch.bundles import Bundle
from garserve.batch.ledger import Ledger
from garserve.batch.pool import Prepared, WorkerPool
from garserve.batch.record import Record
from garserve.batch.selection import Selection
from garserve.batch.source import Source

AHEAD = 4  # parcels that wait for the engine
_JOIN_SECONDS = 5.0  # that a thread is waited for: reading a large JSON file up to its first record takes minutes


@dataclass(frozen=True)
class WorkFound:
    """There is something to ask: an engine is needed."""


@dataclass(frozen=True)
class Arrival:
    """A bundle with its parcel."""

    prepared: Prepared


@dataclass(frozen=True)
class End:
    """There is nothing more; `error` where reading or preparing failed as a whole."""

    error: Exception | None = None


class _Until:
    """A source whose records end where `over` says so."""

    path: Path
    total: int | None

    def __init__(self, source: Source, over: Callable[[], bool]) -> None:
        self._source, self._over = source, over

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def records(self) -> Iterator[Record]:
        for record in self._source.records():
            if self._over():
                return
            yield record


class Feeder:
    """Puts `WorkFound`, `Arrival`s and one `End` into a queue; at most `AHEAD` arrivals are not `taken` yet."""

    def __init__(
        self,
        selection: Selection,
        ledger: Ledger,
        pool: WorkerPool,
        events: "queue.SimpleQueue[Any]",
        *,
        scattered: bool = False,
    ) -> None:
        """Read a selection; what is left of it is `scattered` where it does not follow what is answered."""
        self._selection, self._ledger, self._pool, self._events = selection, ledger, pool, events
        self._answered, self._telling = 0, not scattered  # a count so far says little of scattered ones
        self.unmet: frozenset[str] = frozenset()  # ids that are asked for, of which the whole input has none
        self._room = threading.Semaphore(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="garserve-feeder", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def taken(self) -> None:
        """Make room for another arrival."""
        self._room.release()

    def stop(self) -> None:
        """End early, and wait for the thread; one in the middle of something long is left to end by itself."""
        self._stopped.set()
        self._room.release()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    @property
    def total(self) -> int | None:
        """Records that pass the filters, where known."""
        return self._selection.total

    @property
    def met(self) -> int | None:
        """Of those, records that were answered before, as far as the input was read; None where that says nothing."""
        return self._answered if self._telling else None

    def _run(self) -> None:
        try:
            for prepared in self._pool.parcels(self._bundles(), self._stopped.is_set):
                self._room.acquire()
                if self._stopped.is_set():
                    break
                self._events.put(Arrival(prepared))
            self._events.put(End())
        except Exception as error:  # handed to the job
            self._events.put(End(error))

    def _bundles(self) -> Iterator[Bundle]:
        selection = replace(self._selection, source=_Until(self._selection.source, self._stopped.is_set))
        for number, bundle in enumerate(selection.bundles(self._ledger, self._count, self._miss)):
            if number == 0:
                self._events.put(WorkFound())
            yield bundle
        self._telling = True

    def _count(self, answered: int) -> None:
        self._answered += answered

    def _miss(self, ids: frozenset[str]) -> None:
        if not self._stopped.is_set():  # otherwise the input was not read to its end
            self.unmet = ids
