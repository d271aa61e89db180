"""Peak memory of the front process of a batch against the length of its input.

`python benchmarks/batch_memory.py` runs jobs of 1,000 and 20,000 requests, each in a process of its own, with the tiny
checkpoint's preparation in a worker and an engine that answers at once: what grows is what the job itself keeps.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import save
from PIL import Image

from garserve.batch.prepare import Preparation
from garserve.batch.run import Plan, run_job
from garserve.checkpoint import TINY, resolve
from garserve.config import read_config
from garserve.engine import Engine
from garserve.generation import OnReport, Progress, Sampling
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.model.tile_cache import TileCounts

COUNTS = (1_000, 20_000)
_REGIONS = 20  # of each picture


class InstantBackend:
    """Answers every request with the same words, at once."""

    name = "instant"

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Report the end."""
        on_report(Progress([50] * 20, "length"))
        return lambda: None

    def tile_counts(self) -> TileCounts:
        """Return nothing."""
        return TileCounts()

    def token_room(self) -> int | None:
        """Return no bound."""
        return None

    def close(self) -> None:
        """Do nothing."""


def main(
    only: Annotated[int | None, typer.Option(help="Run one job of so many requests here, and print its peak.")] = None,
    save_results: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/.../batch_memory.json.")
    ] = False,
) -> None:
    """Run both lengths and print the peak memory of each front process in MB."""
    if only is not None:
        print(json.dumps(_job(only)))
        return
    figures = {}
    for count in COUNTS:
        command = [sys.executable, __file__, "--only", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603
        figures[f"{count} requests"] = json.loads(done.stdout.splitlines()[-1])
        print(count, figures[f"{count} requests"])
    if save_results:
        conditions = (
            "peak resident memory of the front process, by getrusage; tiny checkpoint's preparation in one worker, "
            f"{_REGIONS} boxes on each picture, an engine that answers at once"
        )
        print(save("batch_memory", figures, conditions))


def _job(count: int) -> dict[str, Any]:
    checkpoint = resolve(TINY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _requests(folder, count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        engine = Engine(InstantBackend(), Processor(checkpoint, read_config(checkpoint)))
        plan = Plan(source, folder / "out.jsonl", Preparation(str(checkpoint)), workers=1)
        totals = run_job(plan, lambda: engine)
        ids = {json.loads(line)["id"] for line in (folder / "out.jsonl").open()}
        if totals.errors or len(ids) != count:
            raise SystemExit(f"{len(ids)} of {count} rows, {totals.errors} errors: no figures")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = round(time.perf_counter() - start, 1)
    return {"peak_mb": round(peak / 1024, 1), "before_mb": round(before / 1024, 1), "seconds": seconds}


def _requests(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "in.jsonl"
    with path.open("w") as file:
        for picture in range(-(-count // _REGIONS)):
            image = folder / f"{picture}.jpg"
            Image.fromarray(rng.integers(0, 255, (120, 160, 3)).astype(np.uint8)).save(image)
            for number in range(_REGIONS):
                box = [number * 5, number * 3, number * 5 + 40, number * 3 + 30]
                line = {"id": f"{picture}/{number}", "image": image.name, "regions": [{"box": box}]}
                file.write(json.dumps(line) + "\n")
    return path


if __name__ == "__main__":
    typer.run(main)
