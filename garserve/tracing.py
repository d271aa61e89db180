"""Named spans of time along a request's road (floor 1), collected only while somebody records.

    with recording() as spans:
        ...
    write_chrome_trace(path, spans)

Without a recording a span costs a fraction of a microsecond, and nothing is kept. On a GPU a span waits for the device
while recording, so that what it launched belongs to it.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Span:
    """What ran in one thread from `start` for `seconds` (time.perf_counter)."""

    name: str
    start: float
    seconds: float
    thread: str


_spans: list[Span] | None = None


@contextmanager
def recording() -> Iterator[list[Span]]:
    """Collect the spans of all threads of this process, in the order of their ends. One recording at a time."""
    global _spans
    if _spans is not None:
        raise RuntimeError("tracing: a recording is under way")
    found: list[Span] = []
    _spans = found
    try:
        yield found
    finally:
        _spans = None


class span:  # noqa: N801  (reads as a statement)
    """`with span("vision"):` around work that shall have a name."""

    __slots__ = ("_name", "_start")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _spans is not None:
            _wait_for_device()
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        held = _spans
        if held is not None:
            _wait_for_device()
            seconds = time.perf_counter() - self._start
            held.append(Span(self._name, self._start, seconds, threading.current_thread().name))


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def write_chrome_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write spans as Chrome's trace format (chrome://tracing, Perfetto), the first one at 0."""
    begin = min((one.start for one in spans), default=0.0)
    threads = {name: number for number, name in enumerate(dict.fromkeys(one.thread for one in spans))}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
        for name, number in threads.items()
    ]
    events += [
        {
            "ph": "X",
            "name": one.name,
            "pid": 1,
            "tid": threads[one.thread],
            "ts": (one.start - begin) * 1e6,
            "dur": one.seconds * 1e6,
        }
        for one in spans
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
