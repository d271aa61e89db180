"""The two ends of a Ray Data pipeline: what reads the input on the driver's node, and the actors that hold engines.

Imported only where Ray is (`ray_cluster.ray_module`), in the driver and in Ray's own processes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as arrow
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from garserve.batch.bundles import Bundle
from garserve.batch.identity import checkpoint_digest
from garserve.batch.ray_input import pending
from garserve.batch.run import Plan
from garserve.batch.station import Station
from garserve.batch.wire import read_bundle
from garserve.checkpoint import resolve
from garserve.engine import Engine, load
from garserve.errors import GarserveError

WORK, ROW = "work", "row"
_MESSAGES = arrow.list_(arrow.list_(arrow.large_binary()))  # of each bundle
_EXIT_CODE = 70


@dataclass(frozen=True)
class EngineChoice:
    """How every node loads its engine: by the checkpoint's name, which each finds by itself, and its digest."""

    checkpoint: str
    digest: str
    backend: str
    options: dict[str, Any]

    def folder(self) -> str:
        """Return the checkpoint's folder on this node; GarserveError where it is another checkpoint."""
        folder = Path(resolve(self.checkpoint))
        if checkpoint_digest(folder) != self.digest:
            raise GarserveError(f"checkpoint {folder}: on node {_node()}, it is another one than on the driver's")
        return str(folder)

    def open(self) -> Engine:
        """Load the engine."""
        return load(self.checkpoint, self.backend, **self.options)  # type: ignore[arg-type]


class PendingWork(Datasource):
    """Packages of bundles that an output does not have rows for yet.

    `known` are the output's files and how many bytes of each were there when the pass began, so that a second reading,
    which Ray may ask for, finds the same packages. One task reads all of them, on the node of input and output.
    """

    def __init__(self, plan: Plan, known: list[tuple[Path, int]], records: int, control: Any) -> None:
        """Read what `plan` says, with about `records` records in a package."""
        super().__init__()
        self._plan, self._known, self._records, self._control = plan, known, records, control

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows before it is read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the one task."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        schema = arrow.schema([(WORK, _MESSAGES)])
        return [ReadTask(self._read, metadata, schema, per_task_row_limit)]

    def _read(self) -> Iterator[arrow.Table]:
        control = self._control
        for messages in pending(
            self._plan,
            self._known,
            self._records,
            halted=lambda: bool(ray.get(control.halted.remote())),
            ended=lambda read: ray.get(control.reading_ended.remote(read)),
        ):
            yield arrow.table({WORK: arrow.array([messages], _MESSAGES)})


class RayStation:
    """What Ray Data calls: a station in a process of its own, which starts anew elsewhere when it dies."""

    def __init__(self, choice: EngineChoice, plan: Plan, cpus: float, control: Any) -> None:
        """Load the engine."""
        if cpus and not any(ray.get_gpu_ids()):  # vLLM would bind the engines of a node to the same cores
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._control = control
        engine = str(ray.get_runtime_context().get_actor_id())
        ray.get(control.starting.remote(engine))
        try:
            preparation = replace(plan.preparation, folder=choice.folder())
            self._station = Station(preparation, choice.open, limits=plan.limits, workers=plan.workers)
        except BaseException as error:
            ray.get(control.failed.remote(engine, f"on node {_node()}: {error or type(error).__name__}"))
            raise
        ray.get(control.started.remote(engine))
        self._last_numbers = self._station.numbers

    def __call__(self, table: arrow.Table) -> arrow.Table:
        """Answer one package; nothing comes back where the job was told to halt before."""
        found: list[dict[str, Any]] = []
        if not ray.get(self._control.halted.remote()):
            for work in table[WORK].to_pylist():
                found += self._answer([read_bundle(messages) for messages in work])
        again = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        numbers = {"engine": f"{_node()}/{os.getpid()}", "pid": os.getpid(), "again": again, **self._numbers()}
        rows = [json.dumps(one).encode() for one in (*found, {"numbers": numbers})]
        return arrow.table({ROW: arrow.array(rows, arrow.large_binary())})

    def _numbers(self) -> dict[str, float]:
        with suppress(Exception):  # an engine that died after its last answer has none, and its rows are good
            self._last_numbers = self._station.numbers
        return self._last_numbers

    def _answer(self, bundles: list[Bundle]) -> list[dict[str, Any]]:
        try:
            return self._station.answer(bundles)
        except GarserveError as error:  # it does not start again here: Ray starts the process anew, and asks once more
            print(f"garserve: {error}", flush=True)
            os._exit(_EXIT_CODE)


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())[:8]
