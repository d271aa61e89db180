"""Inputs for tests of batches: a picture, requests about it, and the job that answers them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from garserve.batch.limits import Limits, Stop
from garserve.batch.prepare import Preparation
from garserve.batch.run import Plan, run_job
from garserve.batch.totals import Totals
from garserve.engine import Engine
from tests.conftest import write_lines
from tests.echo import EchoBackend, echo_engine


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_requests(folder: Path, count: int, *, images: int = 4) -> Path:
    """Write pictures of noise and requests about boxes on them; one id each, pictures in turns."""
    rng = np.random.default_rng(0)
    for number in range(images):
        Image.fromarray(rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    lines = [
        {"id": f"r{i}", "image": f"{i % images}.png", "regions": [{"box": [i % 60, i % 40, i % 60 + 20, i % 40 + 15]}]}
        for i in range(count)
    ]
    return write_lines(folder / "in.jsonl", lines)


def plan_of(source: Path, output: Path, checkpoint: Path, **options: Any) -> Plan:
    """Return a plan; options of Preparation and of Limits are told apart by their names."""
    names = Preparation.__dataclass_fields__
    how = {name: options.pop(name) for name in list(options) if name in names}
    limits = {name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__}
    preparation = Preparation(str(checkpoint), **{"max_tokens": 3, **how})
    return Plan(source, output, preparation, limits=Limits(**limits), **options)


def run_echo(
    source: Path,
    output: Path,
    checkpoint: Path,
    *,
    stop: Stop | None = None,
    engine: Callable[[], Engine] | None = None,
    backend: EchoBackend | None = None,
    **options: Any,
) -> Totals:
    """Run a job whose engine answers at once."""
    plan = plan_of(source, output, checkpoint, **options)
    return run_job(plan, engine or (lambda: echo_engine(checkpoint, backend)), stop=stop)
