"""Worker processes that prepare ahead of the engine, and what happens when one of them dies."""

import json
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait

import numpy as np

from garserve.batch.bundles import Bundle
from garserve.batch.parcel import Parcel
from garserve.batch.prepare import Preparation, Preparer
from garserve.batch.wire import bundle_messages
from garserve.batch.worker import receive_parcel, send_messages
from garserve.errors import GarserveError

COMMAND = (sys.executable, "-P", "-m", "garserve.batch.worker")  # -P: not what lies in the folder of the data
_ATTEMPTS = 3  # a bundle that kills so many workers is taken apart, a record is given up
_DEATHS_IN_ROW, _DEATHS_A_WORKER = 20, 4  # of workers with whole bundles; more without a parcel end the job
_POLL_SECONDS = 0.5

Prepared = tuple[Bundle, Parcel]


@dataclass(eq=False)
class _Task:
    """A bundle to prepare, or one record of a bundle that was taken apart, whose task is `whole` then.

    `attempts` are those that killed a worker: of a `whole` those of its records, since one of them was prepared.
    """

    bundle: Bundle
    attempts: int = 0
    whole: "_Task | None" = None

    @property
    def divisible(self) -> bool:
        return len(self.bundle.records) > 1

    def apart(self) -> "list[_Task]":
        """Return a task for each record that is wanted; such a record shares no group's mask."""
        self.attempts = 0
        records = zip(self.bundle.records, self.bundle.wanted, strict=True)
        return [_Task(Bundle((record,), (True,)), whole=self) for record, wanted in records if wanted]


class _Worker:
    def __init__(self, preparation: Preparation, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])  # noqa: S603
            self.connection = Connection(ours.detach())
        self.connection.send_bytes(json.dumps(asdict(preparation)).encode())
        self.task: _Task | None = None

    def end(self) -> int:
        """Close the connection, at which a worker ends by itself; return the exit code."""
        self.connection.close()
        try:
            return self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class WorkerPool:
    """`count` worker processes; with 0, bundles are prepared in the calling thread. Close it, or use `with`."""

    def __init__(self, preparation: Preparation, count: int, *, command: Sequence[str] = COMMAND) -> None:
        """Start the workers; they read their processors while the caller does something else."""
        self._preparation, self._command = preparation, command
        self._inline = Preparer(preparation)
        self._workers = [_Worker(preparation, command) for _ in range(count)]
        self.deaths = 0
        self._deaths_in_row = 0  # of workers that had a whole bundle, since the last parcel

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def parcels(self, bundles: Iterator[Bundle], stopped: Callable[[], bool] = lambda: False) -> Iterator[Prepared]:
        """Yield each bundle with its parcel, in whatever order they are ready; ends early where `stopped` says so."""
        if not self._workers:
            for bundle in bundles:
                if stopped():
                    return
                yield bundle, self._inline(bundle)
            return
        try:
            yield from self._handed_out(bundles, stopped)
        except Exception:
            self._renew()  # whoever has a task would answer the next caller with it
            raise

    def _handed_out(self, bundles: Iterator[Bundle], stopped: Callable[[], bool]) -> Iterator[Prepared]:
        again: deque[_Task] = deque()
        exhausted = False
        while not stopped():
            for worker in (one for one in self._workers if one.task is None):
                task = again.popleft() if again else None
                if task is None and not exhausted:
                    following = next(bundles, None)
                    exhausted = following is None
                    task = _Task(following) if following is not None else None
                if task is None:
                    continue
                try:
                    self._give(worker, task)
                except (TypeError, ValueError) as error:  # it holds what no JSON can say
                    if task.divisible:
                        again.extend(task.apart())
                        continue
                    yield task.bundle, _refused(task.bundle, f"request cannot be handed to a worker ({error})")
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            if not busy and exhausted and not again:
                return
            for connection in wait(list(busy), timeout=_POLL_SECONDS) if busy else ():
                yield from self._collect(busy[connection], again)  # type: ignore[index]

    def _give(self, worker: _Worker, task: _Task) -> None:
        messages = bundle_messages(task.bundle)
        worker.task = task
        with suppress(OSError):  # it died while it had nothing to do: the next wait finds its connection's end
            send_messages(worker.connection, messages)

    def _collect(self, worker: _Worker, again: deque[_Task]) -> Iterator[Prepared]:
        task = worker.task
        if task is None:
            return
        try:
            parcel = receive_parcel(worker.connection)
        except (EOFError, OSError):
            self._deaths_in_row += task.whole is None
            yield from self._retried(task, self._replace(worker), again)
            return
        worker.task = None
        self._deaths_in_row = 0
        if task.whole is not None:
            task.whole.attempts = 0
        yield task.bundle, parcel

    def _retried(self, task: _Task, code: int, again: deque[_Task]) -> Iterator[Prepared]:
        """Try a task that killed a worker again, then its records one by one; yield what is given up."""
        task.attempts += 1
        if (whole := task.whole) is not None:
            whole.attempts += 1
            if whole.attempts >= _ATTEMPTS:  # it is not one record that kills but what all have, as their image
                alike = [one for one in again if one.whole is whole]
                for one in alike:
                    again.remove(one)
                yield from ((one.bundle, _given_up(one.bundle, code)) for one in (task, *alike))
                return
        if task.attempts < _ATTEMPTS:
            again.append(task)
        elif task.divisible:
            again.extend(task.apart())
        else:
            yield task.bundle, _given_up(task.bundle, code)

    def _replace(self, dead: _Worker) -> int:
        self.deaths += 1
        code, deaths = dead.end(), self._deaths_in_row
        if deaths > _DEATHS_IN_ROW + _DEATHS_A_WORKER * len(self._workers):
            raise GarserveError(
                f"workers keep dying ({deaths} times in a row, exit code {code}): is there memory enough?"
            )
        self._workers.remove(dead)
        self._workers.append(_Worker(self._preparation, self._command))
        return code

    def _renew(self) -> None:
        for worker in [one for one in self._workers if one.task is not None]:
            self._workers.remove(worker)
            worker.end()
            self._workers.append(_Worker(self._preparation, self._command))

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _given_up(bundle: Bundle, code: int) -> Parcel:
    how = f"killed by signal {-code}; out of memory?" if code < 0 else f"exit code {code}"
    return _refused(bundle, f"the worker that prepared it died ({how})")


def _refused(bundle: Bundle, message: str) -> Parcel:
    errors = {position: message for position, wanted in enumerate(bundle.wanted) if wanted}
    return Parcel(np.zeros((0, 3, 1, 1), np.uint8), errors=errors)
