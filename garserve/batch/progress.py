"""Showing how a job goes: a bar on a terminal, lines of text elsewhere, a table at the end."""

import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from garserve.batch.totals import Totals
from garserve.engine import Engine

_BAR_SECONDS = 0.5
_TILES_SECONDS = 5.0  # between looks into the engine, which answers between two of its steps


class Watched(Protocol):
    """A job that runs."""

    totals: Totals

    @property
    def engine(self) -> Engine | None:
        """Its engine, where it has one in this process."""


class Expected(Protocol):
    """What knows how many records there are."""

    @property
    def total(self) -> int | None:
        """Records that pass the filters, where known."""

    @property
    def met(self) -> int | None:
        """Of those, records that had their rows before; None where nobody counts them."""


class Meter(AbstractContextManager["Meter"]):
    """Watches a job from a thread of its own while the context lasts."""

    def __init__(self, job: Watched, feeder: Expected, console: Console, *, line_seconds: float = 10.0) -> None:
        """Show it on this console, every `line_seconds` where it is no terminal."""
        self._job, self._feeder, self._console = job, feeder, console
        self._line_seconds = line_seconds
        self._tiles = (0, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="garserve-meter", daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if self._console.is_terminal:
            self._show_bar()
        else:
            self._write_lines()

    def _show_bar(self) -> None:
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("reading", total=None)
            over = False
            while not over:
                over = self._over.wait(_BAR_SECONDS)
                totals = self._look()
                shown = status(totals, self._tiles)
                progress.update(task, total=totals.total, completed=totals.done, description=shown)

    def _write_lines(self) -> None:
        while not self._over.wait(self._line_seconds):
            self._console.print(status(self._look(), self._tiles), highlight=False, soft_wrap=True)

    def _look(self) -> Totals:
        totals = self._job.totals
        totals.total, totals.met = self._feeder.total, self._feeder.met
        now = time.monotonic()
        if now - getattr(self, "_looked", 0.0) >= _TILES_SECONDS and (engine := self._job.engine) is not None:
            self._looked = now
            with suppress(Exception):  # an engine that has just been closed
                counts = engine.tile_counts
                self._tiles = (counts.asked, counts.computed)
        return totals


def status(totals: Totals, tiles: tuple[int, int] = (0, 0)) -> str:
    """Return one line about a running job; `tiles` asked for and computed."""
    of = "" if totals.total is None else f" of {totals.total}"
    parts = [
        f"{totals.done}{of} rows",
        f"{totals.regions_per_second:.1f} regions/s",
        f"{totals.tokens_per_second:.0f} tokens/s",
        f"{totals.errors} errors",
    ]
    if tiles[0]:
        parts.insert(3, f"{1 - tiles[1] / tiles[0]:.0%} of tiles reused")
    eta = totals.eta_seconds()
    return ", ".join(parts) + ("" if eta is None else f", {_duration(eta)} left")


def summary(totals: Totals, output: Path) -> Table:
    """Return the table at the end of a run."""
    table = Table(title=escape(str(output)), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    hit_rate = totals.tile_hit_rate
    prefilled = totals.prompt_tokens - totals.cached_tokens
    per_region = f" ({prefilled / totals.regions:.1f} a region)" if totals.regions else ""
    forms = ", ".join(f"{count} {form}" for form, count in sorted(totals.forms.items()))
    for name, value in (
        ("rows of the output", f"{totals.before + totals.rows}"),
        ("rows of this run", f"{totals.rows}"),
        ("errors", f"{totals.errors}"),
        ("regions", f"{totals.regions}"),
        ("form of the prompts", forms or "-"),
        ("time", _duration(totals.elapsed())),
        ("regions/s", f"{totals.regions_per_second:.2f}"),
        ("tokens/s, prefilled and decoded", f"{totals.tokens_per_second:.0f}"),
        ("tokens prefilled", f"{prefilled}{per_region}"),
        ("tokens from the prefix cache", f"{totals.cached_tokens}"),
        ("tokens decoded", f"{totals.answer_tokens}"),
        ("tiles reused", "-" if hit_rate is None else f"{hit_rate:.1%} of {totals.tiles}"),
        ("engine waited for input", f"{totals.idle_seconds:.1f} s ({totals.idle_share:.1%})"),
        ("workers that died", f"{totals.worker_deaths}"),
        ("engines that died", f"{totals.engine_restarts}"),
    ):
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
