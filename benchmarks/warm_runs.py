"""Runs of a batch and of a loop over the same requests: each with a warm engine of its own, and what is timed.

Both clocks begin with the engine, and the workers of a batch, loaded and warm, and with nothing of the requests read or
prepared. Both end with the last answer: closing an engine counts for neither.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import garserve
from garserve.batch.bundles import Bundle
from garserve.batch.feeder import Feeder
from garserve.batch.limits import Limits
from garserve.batch.prepare import Preparation
from garserve.batch.record import Record
from garserve.batch.run import Plan, run_job
from garserve.batch.totals import Totals
from garserve.bench.runtime import runtime
from garserve.checkpoint import TINY, resolve
from garserve.engine import Engine
from garserve.model.tile_cache import TileCounts

MAX_TOKENS = 48
WARM_IMAGE = str(Path(garserve.__file__).parent / "data" / "coffee.jpg")  # no picture that is asked about
WARM_REGIONS = ({"box": [10, 10, 120, 90]},)


@dataclass(frozen=True)
class Data:
    """A requests file and what is true of each of its regions, by id."""

    path: Path
    truth: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Run:
    """What a job did."""

    totals: Totals
    texts: dict[str, str]
    sizes: dict[str, int]  # of the group that each region was asked in


@dataclass(frozen=True)
class Loop:
    """What a loop of `describe` calls did, and where its tower ran."""

    texts: dict[str, str]
    seconds: float
    tower: str

    @property
    def regions_per_second(self) -> float:
        """Regions that were described, per second."""
        return len(self.texts) / self.seconds


class Lent(Engine):
    """A warm engine lent to a job, which does not close it; its tiles count from here on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.backend, engine.processor)
        self._before = engine.tile_counts

    @property
    def tile_counts(self) -> TileCounts:
        """What became of the tiles since it was lent."""
        now, before = astuple(super().tile_counts), astuple(self._before)
        return TileCounts(*(new - old for new, old in zip(now, before, strict=True)))

    def close(self) -> None:
        """Do nothing: who lent it closes it."""


def run_batch(data: Data, output: Path, form: tuple[int, float], block: int, workers: int) -> Run:
    """Run a job: `form` has the size of its groups and the gap of their regions, `block` the tokens of a KV block.

    Raises SystemExit where a row is missing or has an error.
    """
    group, gap = form
    plan = Plan(
        input=data.path,
        output=output,
        preparation=Preparation(str(resolve(TINY)), group=group, group_gap=gap, max_tokens=MAX_TOKENS),
        limits=Limits(),
        workers=workers,
    )
    with _warm_engine(block) as engine:
        totals = run_job(plan, lambda: Lent(engine), watch=lambda _job, feeder: _warm_workers(feeder, workers))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    if any("error" in row for row in rows) or len(rows) != len(data.truth):
        raise SystemExit(f"group {group}: {totals.errors} errors, {len(rows)} of {len(data.truth)} rows: no figures")
    sizes = {row["id"]: int(row["form"].removeprefix("group of ")) if group > 1 else 1 for row in rows}
    return Run(totals, {row["id"]: row["text"] for row in rows}, sizes)


def run_loop(data: Data, ids: list[str], block: int) -> Loop:
    """Describe regions one call at a time."""
    lines = {line["id"]: line for line in map(json.loads, data.path.read_text().splitlines())}
    texts = {}
    with _warm_engine(block) as engine:
        start = time.perf_counter()
        for identity in ids:
            line = lines[identity]
            texts[identity] = engine.describe(line["image"], line["regions"], max_tokens=MAX_TOKENS)[0].text
        return Loop(texts, time.perf_counter() - start, runtime(engine).tower)


@contextmanager
def _warm_engine(block: int) -> Iterator[Engine]:
    with garserve.load(block_size=block) as engine:
        engine.describe(WARM_IMAGE, WARM_REGIONS, max_tokens=MAX_TOKENS)
        yield engine


@contextmanager
def _warm_workers(feeder: Feeder, count: int) -> Iterator[None]:
    """Have each worker of a job prepare the region that warms, before the job begins."""
    warming = Bundle((Record("warm", image=WARM_IMAGE, regions=WARM_REGIONS),), (True,))
    for _, parcel in feeder._pool.parcels(iter([warming] * count)):  # the job's own, which nothing else has
        if parcel.errors:
            raise SystemExit(f"the region that warms cannot be prepared ({parcel.errors}): no figures")
    yield
