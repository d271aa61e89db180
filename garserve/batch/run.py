"""A whole job, from an input to an output: what `garserve batch` does, without its words."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from garserve.batch.feeder import Feeder
from garserve.batch.filters import Filters
from garserve.batch.identity import check_job, describe_job
from garserve.batch.job import Job
from garserve.batch.journal import Journal
from garserve.batch.ledger import Ledger
from garserve.batch.limits import Limits, Stop
from garserve.batch.parts import Parts
from garserve.batch.pool import WorkerPool
from garserve.batch.prepare import Preparation
from garserve.batch.retry import note_asked
from garserve.batch.selection import Selection
from garserve.batch.source import Format, Reading, Source
from garserve.batch.sources import open_source
from garserve.batch.totals import Totals
from garserve.engine import Engine
from garserve.errors import RequestError

Watch = Callable[[Job, Feeder], AbstractContextManager[object]]


@dataclass(frozen=True)
class Plan:
    """Everything that a person says about a job. `workers` 0 prepares in a thread of this process.

    `mix` adds to an output that another checkpoint, prompt, tiling or input began; `retry_errors` asks error rows
    again, of the input's records that the filters let through.
    """

    input: Path
    output: Path
    preparation: Preparation
    format: Format | None = None
    reading: Reading = field(default_factory=Reading)
    filters: Filters = field(default_factory=Filters)
    limits: Limits = field(default_factory=Limits)
    workers: int = 0
    mix: bool = False
    retry_errors: bool = False
    vision: str | None = None  # what computes tiles, where it is not the tower in torch
    folders: tuple[Path, ...] = ()  # where images lie, as shards name them; by default seen from the input

    def open_source(self) -> Source:
        """Open the input; RequestError where it cannot be read, or where the output would overwrite it."""
        if self.output.exists() and self.input.exists() and self.output.samefile(self.input):
            raise RequestError(f"output {self.output}: is the input itself")
        return open_source(self.input, self.format, self.reading)

    def selection(self, source: Source) -> Selection:
        """Return what of the source is asked."""
        folders = self.folders or self._folders()
        return Selection(source, self.filters, self.preparation.group, self.reading.each_region, self.mix, folders)

    def absolute(self) -> "Plan":
        """Return the plan for a process with another working directory: the same files, records and shards."""
        images, masks = (folder and folder.absolute() for folder in (self.reading.images, self.reading.masks))
        return replace(
            self,
            input=self.input.absolute(),
            output=self.output.absolute(),
            reading=replace(self.reading, images=images, masks=masks),
            folders=self.folders or self._folders(),  # a path's parents are other ones when it is whole
        )

    def drop_errors(self, source: Source, output: Journal | Parts) -> None:
        """Take the error rows that are asked again out of an output; those of another input, or filtered out, stay."""
        with closing(Ledger()) as asked:
            note_asked(self.selection(source), asked)
            output.drop_errors(lambda identity: asked.digest(identity) is not None)

    def _folders(self) -> tuple[Path, ...]:
        whole = Path(os.path.abspath(self.input))  # a bare name has no folder above its own
        beside = whole if whole.is_dir() else whole.parent
        images = () if self.reading.images is None else (Path(os.path.abspath(self.reading.images)),)
        return (*images, beside, beside.parent)

    def description(self) -> dict[str, Any]:
        """Return what texts depend on."""
        return describe_job(self.preparation, self.filters, each_region=self.reading.each_region, vision=self.vision)


def run_job(
    plan: Plan,
    open_engine: Callable[[], Engine],
    *,
    stop: Stop | None = None,
    totals: Totals | None = None,
    watch: Watch | None = None,
) -> Totals:
    """Answer whatever of an input its output does not hold yet, and return what was done.

    `stop` says afterwards whether and why the job ended early. Raises RequestError before anything is written where
    the input or the output cannot be used, or where the output was begun by another job.
    """
    source = plan.open_source()
    totals = totals or Totals()
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(plan.output))
        check_job(journal, plan.description(), mix=plan.mix)
        if plan.retry_errors:
            plan.drop_errors(source, journal)
        ledger = Ledger()
        stack.callback(ledger.close)
        totals.before = ledger.answered(totals.counting(journal.rows()))
        pool = stack.enter_context(WorkerPool(plan.preparation, plan.workers))
        job = Job(open_engine, journal, limits=plan.limits, totals=totals, stop=stop)
        feeder = Feeder(plan.selection(source), ledger, pool, job.events, scattered=plan.retry_errors)
        with watch(job, feeder) if watch else nullcontext():
            job.run(feeder)
        totals.worker_deaths = pool.deaths
        totals.total, totals.met, totals.unmet = feeder.total, feeder.met, feeder.unmet
        totals.seconds = totals.elapsed()
    return totals
