"""Running a job: parcels into the engine, rows out of it, until all are answered or something stops it."""

import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from garserve.batch.admission import Admission
from garserve.batch.feeder import Arrival, End, WorkFound
from garserve.batch.journal import OutputError, Sink
from garserve.batch.limits import Halt, Limits, Stop
from garserve.batch.parcel import Entry, Parcel
from garserve.batch.record import Record
from garserve.batch.rows import answer_row, error_row
from garserve.batch.totals import Totals
from garserve.engine import Engine
from garserve.errors import GarserveError, InputError
from garserve.generation import Report
from garserve.inputs.processor import PreparedRequest

_POLL_SECONDS = 0.5  # how late a fsync, or a look at the queue, may be


class Feed(Protocol):
    """What puts `WorkFound`, `Arrival`s and `End` into a job's events."""

    def start(self) -> None:
        """Begin."""

    def taken(self) -> None:
        """Make room for another arrival: all requests of one are in the engine."""

    def stop(self) -> None:
        """End early."""


@dataclass
class _Running:
    record: Record
    entry: Entry
    parcel: Parcel
    prepared: PreparedRequest | None = None
    since: float = 0.0
    released: bool = False  # its parcel made room for another already, before an engine died
    cancel: Callable[[], None] = lambda: None

    @property
    def tokens(self) -> int:
        return len(self.entry.token_ids) + self.entry.max_tokens


@dataclass(frozen=True)
class _Reported:
    number: int
    report: Report


class Job:
    """One run of a job. `totals` may be read from other threads while it runs."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        sink: Sink,
        *,
        limits: Limits | None = None,
        totals: Totals | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Prepare a run; `open_engine` is called where there is something to ask, and again when an engine died."""
        self._open_engine, self._sink = open_engine, sink
        self._limits, self.stop = limits or Limits(), stop or Stop()
        self.totals = totals or Totals()
        self.engine: Engine | None = None
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: deque[_Running] = deque()
        self._running: dict[int, _Running] = {}
        self._numbers = 0
        self._waiting: dict[int, int] = {}  # of each parcel, by its identity: requests that are not in the engine yet
        self._ended = False

    def run(self, feeder: Feed) -> None:
        """Answer everything that a feeder brings; `stop` says afterwards whether and why it ended early."""
        self._feeder = feeder
        with self.stop.watching():
            self._run()
        with suppress(OutputError):  # what matters was told, or the last rows are written again next time
            self._sink.sync()

    def _run(self) -> None:
        self._feeder.start()
        try:
            while not self._finished():
                self._handle(self._next())
                self._admit()
                self._sink.sync(force=False)
        except OutputError as error:
            self.stop.tell(str(error), Halt.now)
        finally:
            self._feeder.stop()
            for one in self._running.values():
                one.cancel()
            self._close()

    def _finished(self) -> bool:
        if self.stop.halt is Halt.now:
            return True
        if self.stop.halt is Halt.drain:
            return not self._running
        return self._ended and not self._ready and not self._running

    def _next(self) -> Any:
        """Wait for what happens next; waiting with nothing in the engine is the engine's waiting for input."""
        idle = self.engine is not None and not self._running and not self._ended
        before = time.monotonic()
        try:
            return self.events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        finally:
            if idle:
                self.totals.idle_seconds += time.monotonic() - before

    def _handle(self, event: Any) -> None:
        if isinstance(event, WorkFound):
            if self.engine is None:
                self._start()
        elif isinstance(event, Arrival):
            self._arrived(*event.prepared)
        elif isinstance(event, _Reported):
            self._reported(event)
        elif isinstance(event, End):
            self._ended = True
            if isinstance(event.error, InputError) and self.engine is None and not self.totals.rows:
                raise event.error  # nothing was begun
            if event.error is not None:
                self.stop.tell(f"{event.error}")

    def _start(self) -> None:
        with self.stop.watching(False):  # loading takes minutes
            self.engine = self._open_engine()
        self._admission = Admission(self._limits.in_flight, self.engine.backend.token_room())
        self.totals.begun = time.monotonic()

    def _arrived(self, bundle: Any, parcel: Parcel) -> None:
        for position, error in parcel.errors.items():
            if self.stop.halt:  # what runs is finished; this is read again next time
                break
            self._error(bundle.records[position], error, parcel.regions.get(position))
        if not parcel.entries or self.stop.halt:
            self._feeder.taken()
            return
        self._waiting[id(parcel)] = len(parcel.entries)
        self._ready.extend(_Running(bundle.records[entry.record], entry, parcel) for entry in parcel.entries)

    def _admit(self) -> None:
        while self._ready and not self.stop.halt:
            if self.engine is None or not self._admission.admits(self._ready[0].tokens):
                return
            one = self._ready.popleft()
            self._submit(one)
            if one.released:
                continue
            left = self._waiting.get(id(one.parcel), 0) - 1
            self._waiting[id(one.parcel)] = left
            if left == 0:
                del self._waiting[id(one.parcel)]
                self._feeder.taken()

    def _submit(self, one: _Running) -> None:
        assert self.engine is not None  # noqa: S101  (its caller has looked)
        number = self._numbers = self._numbers + 1
        one.prepared = one.prepared or one.parcel.prepared(one.entry)
        one.since = time.monotonic()
        self._running[number] = one
        self._admission.enter(one.tokens)
        entry = one.entry
        try:
            one.cancel = self.engine.submit(
                one.prepared,
                lambda report: self.events.put(_Reported(number, report)),
                max_tokens=entry.max_tokens,
                temperature=entry.temperature,
                seed=entry.seed,
            )
        except Exception as error:  # refused at once, or the engine is gone
            self.events.put(_Reported(number, error))

    def _reported(self, event: _Reported) -> None:
        one = self._running.get(event.number)
        if one is None:
            return
        report = event.report
        if isinstance(report, Exception) and not isinstance(report, InputError):
            self._engine_died(report)
            return
        del self._running[event.number]
        self._admission.leave(one.tokens)
        if isinstance(report, Exception):
            self._error(one.record, str(report), one.parcel.regions.get(one.entry.record))
            return
        assert self.engine is not None and one.prepared is not None  # noqa: S101, PT018  (it was submitted)
        answer = self.engine.finished(one.prepared, report)
        self._write(answer_row(one.record, one.entry, one.parcel, answer, time.monotonic() - one.since))

    def _error(self, record: Record, error: str, regions: list[dict[str, Any]] | None) -> None:
        self._write(error_row(record, error, regions))
        most = self._limits.max_errors
        if most is not None and self.totals.errors > most:
            self.stop.tell(f"more than {most} errors (--max-errors)")

    def _write(self, row: dict[str, Any]) -> None:
        self._sink.append(row)
        self.totals.add_row(row)

    def _engine_died(self, error: Exception) -> None:
        """Put all that it had back to the front of the queue and start another one, a bounded number of times."""
        for one in reversed(self._running.values()):
            self._admission.leave(one.tokens)
            if id(one.parcel) in self._waiting:
                self._waiting[id(one.parcel)] += 1
            else:
                one.released = True
            self._ready.appendleft(one)
        self._running.clear()
        if self.totals.engine_restarts >= self._limits.restarts or self.stop.halt:
            self.stop.tell(f"the engine died: {error}", Halt.now)
            return
        self.totals.engine_restarts += 1
        self._close()
        before = self.totals.begun
        try:
            self._start()
        except GarserveError as failed:
            self.stop.tell(f"the engine died ({error}) and did not start again: {failed}", Halt.now)
        self.totals.begun = before

    def _close(self) -> None:
        engine, self.engine = self.engine, None
        if engine is None:
            return
        with suppress(Exception):  # a dead one is not in any state to say anything more
            counts = engine.tile_counts
            self.totals.tiles += counts.asked
            self.totals.tiles_computed += counts.computed
        with suppress(Exception):
            engine.close()
