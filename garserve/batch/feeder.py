"""The thread ahead of the engine: reads records, leaves out what is answered, has the others prepared, and waits."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from garserve.batch.bundles import Bundle, gather
from garserve.batch.filters import Filters
from garserve.batch.ledger import Ledger
from garserve.batch.pool import Prepared, WorkerPool
from garserve.batch.record import Record
from garserve.batch.source import Source
from garserve.batch.sources import each_region

AHEAD = 4  # parcels that wait for the engine


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


class Feeder:
    """Puts `WorkFound`, `Arrival`s and one `End` into a queue; at most `AHEAD` arrivals are not `taken` yet."""

    def __init__(
        self,
        source: Source,
        filters: Filters,
        ledger: Ledger,
        pool: WorkerPool,
        events: "queue.SimpleQueue[Any]",
        *,
        group: int = 1,
        split_regions: bool = False,
    ) -> None:
        self._source, self._filters, self._ledger, self._pool, self._events = source, filters, ledger, pool, events
        self._group, self._split = group, split_regions
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
        """End early, and wait for the thread."""
        self._stopped.set()
        self._room.release()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def total(self) -> int | None:
        """Records that pass the filters, where known."""
        return None if self._split else self._filters.expected(self._source.total)

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
        found = False
        records = self._source.records()
        if self._split:
            records = each_region(records)
        for of_image in gather(self._filters.of(self._once(records)), group=self._group):
            wanted = tuple(not self._ledger.is_answered(record.key) for record in of_image)
            if not any(wanted):
                continue
            if not found:
                found = True
                self._events.put(WorkFound())
            if self._group == 1:
                of_image = tuple(record for record, flag in zip(of_image, wanted, strict=True) if flag)
                wanted = (True,) * len(of_image)
            yield Bundle(of_image, wanted)

    def _once(self, records: Iterator[Record]) -> Iterator[Record]:
        """Turn a record whose id came up before into an error that is named by its place."""
        for record in records:
            if self._ledger.first_time(record.key):
                yield record
                continue
            place, again = record.place, 1
            while not self._ledger.first_time(replace(record, id=None, place=place).key):
                again += 1
                place = f"{record.place} again {again}"
            yield replace(record, id=None, place=place, error=f"id: {record.key!r:.80} came up before in this input")
