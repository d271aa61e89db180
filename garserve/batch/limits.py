"""What bounds a running job, and what ends it before its time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum


class Halt(IntEnum):
    """How far a job is to be stopped."""

    no = 0
    drain = 1  # finish what the engine has, begin nothing
    now = 2


class Stop:
    """What a person, a signal or a limit tells a running job; `tell` may be called from signal handlers, too."""

    def __init__(self) -> None:
        self.halt = Halt.no
        self.reason: str | None = None
        self.watched = False  # whether the main thread looks at `halt` soon; where it does not, it can be interrupted

    def tell(self, reason: str, halt: Halt = Halt.drain) -> None:
        """Stop the job as far as that, or further where it was told before."""
        self.halt = max(self.halt, halt)
        self.reason = self.reason or reason

    @contextmanager
    def watching(self, flag: bool = True) -> Iterator[None]:
        """Note that `halt` is looked at while the context lasts, or that it is not."""
        before, self.watched = self.watched, flag
        try:
            yield
        finally:
            self.watched = before


@dataclass(frozen=True)
class Limits:
    """`in_flight` requests at most are in the engine; more than `max_errors` end the job; a dead engine is replaced."""

    in_flight: int = 128
    max_errors: int | None = None
    restarts: int = 2
