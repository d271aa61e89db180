"""What of a Ray Data pipeline needs no Ray: how the input is read for it, and what its ends tell each other."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from garserve.batch.bundles import Bundle
from garserve.batch.journal import read_rows
from garserve.batch.ledger import Ledger
from garserve.batch.run import Plan
from garserve.batch.wire import told_messages
from garserve.errors import GarserveError, InputError

_STARTS = 3  # that an engine may die in, one after the other


@dataclass(frozen=True)
class Read:
    """How the reading of an input ended: `whole` or not yet, or why it failed, and whether the input is to blame."""

    whole: bool = False
    why: str | None = None
    of_input: bool = False


class Control:
    """An actor that others ask whether to halt, and that knows how reading ended and which engines start."""

    def __init__(self) -> None:
        self._halted = False
        self._starts: dict[str, int] = {}  # of each engine, since it last answered that it runs
        self._failed: dict[str, str] = {}
        self._read = Read()

    def starting(self, engine: str) -> None:
        """An engine is about to load."""
        self._starts[engine] = self._starts.get(engine, 0) + 1

    def started(self, engine: str) -> None:
        """An engine runs."""
        self._starts[engine] = 0
        self._failed.pop(engine, None)

    def failed(self, engine: str, why: str) -> None:
        """An engine could not be loaded, after which Ray does not start it again."""
        self._failed[engine] = why

    def hopeless(self, engines: int) -> str | None:
        """Return why none of so many engines will ever answer; None while one may."""
        dying = [engine for engine, starts in self._starts.items() if starts > _STARTS and engine not in self._failed]
        if len(self._failed) + len(dying) < engines:
            return None
        return next(iter(self._failed.values()), f"engines die while they start, {_STARTS + 1} times each")

    def reading_ended(self, read: Read) -> None:
        """The input was read to its end, or could not be."""
        self._read = read

    def reading(self) -> Read:
        """Return how reading ended; neither `whole` nor failed while it goes on, or where its process died."""
        return self._read

    def halt(self) -> None:
        """From now on, nothing is begun."""
        self._halted = True

    def halted(self) -> bool:
        """Say whether it was told to halt."""
        return self._halted


def pending(
    plan: Plan,
    known: list[tuple[Path, int]],
    records: int,
    halted: Callable[[], bool],
    ended: Callable[[Read], object],
) -> Iterator[list[list[bytes]]]:
    """Yield, package by package, the messages of bundles that an output does not have rows for yet.

    `known` are the output's files and how many bytes of each count; `records`, about, are in a package. `ended` is told
    how reading ended, unless it was `halted`: Ray takes an exception for the loss of one package, and goes on.
    """
    try:
        with closing(Ledger()) as ledger:
            for path, size in known:
                ledger.answered(read_rows(path, size))
            for package in packed(plan.selection(plan.open_source()).bundles(ledger), records):
                if halted():
                    return
                yield [told_messages(bundle) for bundle in package]
    except Exception as error:
        why = str(error) if isinstance(error, GarserveError) else f"{type(error).__name__}: {error}"
        ended(Read(why=why, of_input=isinstance(error, InputError)))
        raise
    ended(Read(whole=True))


def packed(bundles: Iterator[Bundle], records: int) -> Iterator[list[Bundle]]:
    """Yield bundles in packages with at least so many records that are wanted."""
    package: list[Bundle] = []
    count = 0
    for bundle in bundles:
        package.append(bundle)
        count += sum(bundle.wanted)
        if count >= records:
            yield package
            package, count = [], 0
    if package:
        yield package
