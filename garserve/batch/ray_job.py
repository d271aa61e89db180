"""A whole job on a Ray cluster: bundles through Ray Data to actors that hold engines, rows back to one writer."""

import json
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from garserve.batch.identity import check_job
from garserve.batch.journal import OutputError, part_paths
from garserve.batch.ledger import Ledger
from garserve.batch.limits import Halt, Stop
from garserve.batch.parts import Parts
from garserve.batch.ray_cluster import Engines, Placement, cluster, ray_module
from garserve.batch.ray_input import Control, Read
from garserve.batch.rows import error_row
from garserve.batch.run import Plan
from garserve.batch.selection import Selection
from garserve.batch.temporary import SpaceError
from garserve.batch.totals import Totals
from garserve.checkpoint import TINY
from garserve.engine import Engine
from garserve.errors import RequestError

_PASSES = 3  # over what has no row yet; all but the first are for what Ray lost, with less in a package
_CALLS = 3  # packages that an engine works on at a time, so that it never runs dry
_RETRIES = 3  # of a package whose actor died
_LINE = 400  # characters of what went wrong on a node
_LOST_PACKAGES = 16  # in a pass, before the pass is given up
_GPU_MEMORY = 0.92  # of a GPU, vLLM's own choice; engines that share one have their parts of it
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0  # between two looks at whether engines start

Watch = Callable[["RayJob"], AbstractContextManager[object]]


class RayJob:
    """One run of a job on a cluster. `totals` may be read from other threads while it runs."""

    engine: Engine | None = None  # what a meter looks at: there is none in this process

    def __init__(
        self,
        plan: Plan,
        checkpoint: str,
        backend: str,
        options: dict[str, Any],
        engines: Engines,
        *,
        stop: Stop | None = None,
        totals: Totals | None = None,
        rows_a_part: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Prepare a run of `plan`, whose output is a folder; the nodes load `checkpoint` with `options`.

        Relative paths are taken from this process's working directory: Ray's processes have another one.
        """
        self._plan, self._engines, self._verbose = plan.absolute(), engines, verbose
        self._checkpoint, self._backend = _whole(checkpoint), backend
        self._options = {name: one.absolute() if isinstance(one, Path) else one for name, one in options.items()}
        self._part_options = {} if rows_a_part is None else {"rows_a_part": rows_a_part}
        self.stop, self.totals = stop or Stop(), totals or Totals()
        self.pids: set[int] = set()  # of the actors that have answered, on whichever nodes
        self._numbers: dict[str, dict[str, Any]] = {}  # of every engine, the newest

    @property
    def total(self) -> int | None:
        """Records that pass the filters, where known."""
        return self._selection.total

    @property
    def met(self) -> None:
        """The input is read in another process, which counts nothing."""

    def run(self, watch: Watch | None = None) -> Totals:
        """Answer whatever of the input the output does not hold yet, and return what was done.

        Raises RequestError before anything is written where the input or the output cannot be used, where the output
        was begun by another job, or where the cluster has not the room that was asked for.
        """
        plan = self._plan
        ray_module()
        source = plan.open_source()
        self._selection = plan.selection(source)
        with ExitStack() as stack:
            self._parts = stack.enter_context(Parts(plan.output, **self._part_options))
            description = plan.description()
            check_job(self._parts, description, mix=plan.mix)
            if plan.retry_errors:
                plan.drop_errors(source, self._parts)
            self._ledger = Ledger()
            stack.callback(self._ledger.close)
            self.totals.before = self._ledger.answered(self.totals.counting(self._parts.rows()))
            complete = False
            try:
                if not (complete := self._complete()):
                    placement = stack.enter_context(cluster(self._engines, verbose=self._verbose))
                    with watch(self) if watch else nullcontext():
                        complete = self._passes(placement, description["checkpoint"])
            except (OutputError, SpaceError) as error:
                self.stop.tell(str(error), Halt.now)
            except RequestError as error:  # the input, which is read again after each pass
                if not self.totals.rows:
                    raise
                self.stop.tell(str(error), Halt.now)
            finally:
                with suppress(OutputError):  # the parts themselves say what is answered
                    self._parts.write_manifest(complete=complete)
            self._sum_up()
        return self.totals

    def _passes(self, placement: Placement, digest: str) -> bool:
        """Ask until everything has its row; what loses every engine that is asked becomes error rows.

        Where the input was not read to its end, what is missing may never have been asked, and no row is written.
        """
        whole = False
        for number in range(_PASSES):
            records = max(self._plan.limits.in_flight // 2, 1) if number == 0 else 1
            with self.stop.watching():
                whole = self._pass(placement, digest, records)
            if self.stop.halt:
                return False
            if self._complete():
                return True
        if not whole:
            self.stop.tell(f"Ray: what reads the input died, in {_PASSES} passes", Halt.now)
            return False
        for bundle in self._missing():
            for record, wanted in zip(bundle.records, bundle.wanted, strict=True):
                if wanted:
                    self._write(error_row(record, f"the engine that was asked died, in {_PASSES} passes"))
        return not self.stop.halt

    def _missing(self) -> Iterator[Any]:
        """Read the input again, and from the disk what is answered; yield the bundles that are not."""
        ledger = Ledger()
        try:
            ledger.answered(self._parts.rows())
            yield from Selection.bundles(self._selection, ledger, on_unmet=self._miss)
        finally:
            ledger.close()

    def _miss(self, ids: frozenset[str]) -> None:
        self.totals.unmet = ids

    def _complete(self) -> bool:
        return next(self._missing(), None) is None

    def _pass(self, placement: Placement, digest: str, records: int) -> bool:
        """Ask for what has no row yet, once; say whether the input was read to its end."""
        control, dataset = self._pipeline(placement, digest, records)
        tables: queue.Queue[Any] = queue.Queue(maxsize=8)
        over = threading.Event()

        def pull() -> None:
            try:
                found = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
                if all(_put(tables, table, over) for table in found):
                    _put(tables, None, over)
            except BaseException as error:  # handed over
                _put(tables, error, over)

        threading.Thread(target=pull, name="garserve-ray", daemon=True).start()
        halted, looked = False, time.monotonic()
        try:
            while self.stop.halt is not Halt.now:
                if self.stop.halt and not halted:
                    control.halt.remote()
                    halted = True
                try:
                    table = tables.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    self._parts.sync(force=False)
                    if time.monotonic() - looked > _LOOK_SECONDS:
                        looked = time.monotonic()
                        if (why := ray_module().get(control.hopeless.remote(placement.count))) is not None:
                            self.stop.tell(f"Ray: no engine starts: {why}"[:_LINE], Halt.now)
                    continue
                if table is None:
                    return self._was_read(ray_module().get(control.reading.remote()))
                if isinstance(table, BaseException):
                    self.stop.tell(f"Ray: {_first_line(table)}", Halt.now)
                    return False
                for row in table["row"].to_pylist():
                    self._take(json.loads(row))
            return False
        finally:
            over.set()

    def _was_read(self, read: Read) -> bool:
        """Say whether a pass read the input to its end; stop the job, or raise RequestError, where that failed."""
        if read.why is None or self.stop.halt:
            return read.whole
        if read.of_input:
            raise RequestError(read.why)
        self.stop.tell(f"the input could not be read on: {read.why}"[:_LINE], Halt.now)
        return False

    def _pipeline(self, placement: Placement, digest: str, records: int) -> tuple[Any, Any]:
        ray = ray_module()
        from ray.data import ActorPoolStrategy, DataContext
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from garserve.batch.ray_data import EngineChoice, PendingWork, RayStation

        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = 1  # every package is a block of its own, so that any engine may take it
        context.max_errored_blocks = _LOST_PACKAGES
        self._parts.sync()
        known = [(path, path.stat().st_size) for path in part_paths(self._parts.path)]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        control = ray.remote(num_cpus=0)(Control).options(scheduling_strategy=here).remote()
        dataset = ray.data.read_datasource(
            PendingWork(self._plan, known, records, control),
            override_num_blocks=1,
            num_cpus=0,
            resources={_this_node(ray): 0.001},
        )
        options = self._options
        if self._backend == "vllm" and 0 < placement.gpus < 1:
            options = {"gpu_memory_utilization": round(_GPU_MEMORY * placement.gpus, 3), **options}
        choice = EngineChoice(self._checkpoint, digest, self._backend, options)
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")  # the only way to say retries
        return control, dataset.map_batches(
            RayStation,
            fn_constructor_args=(choice, self._plan, placement.cpus, control),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            max_task_retries=_RETRIES,
            compute=ActorPoolStrategy(
                size=placement.count,
                max_tasks_in_flight_per_actor=2 * _CALLS,
                max_concurrent_calls_per_actor=_CALLS,
                enable_true_multi_threading=True,
            ),
        )

    def _take(self, row: dict[str, Any]) -> None:
        if (numbers := row.get("numbers")) is not None:
            self._numbers[numbers["engine"]] = numbers
            self.pids.add(numbers["pid"])
        elif self._ledger.digest(row["id"]) is None:  # a package may be answered twice, when its actor died late
            self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        self._parts.append(row)
        self._ledger.note(row)
        self.totals.add_row(row)
        most = self._plan.limits.max_errors
        if most is not None and self.totals.errors > most:
            self.stop.tell(f"more than {most} errors (--max-errors)")

    def _sum_up(self) -> None:
        totals, numbers = self.totals, list(self._numbers.values())
        totals.tiles = sum(one["tiles"] for one in numbers)
        totals.tiles_computed = sum(one["tiles_computed"] for one in numbers)
        totals.worker_deaths = sum(one["worker_deaths"] for one in numbers)
        totals.engine_restarts = sum(one["engine_restarts"] + one["again"] for one in numbers)
        totals.idle_seconds = sum(one["idle_seconds"] for one in numbers) / max(len(numbers), 1)
        totals.total = self.total
        totals.seconds = totals.elapsed()


def _this_node(ray: Any) -> str:
    """Return the resource that only this node has: the input and the output may lie on its own disk."""
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return next(name for name in resources if name.startswith("node:") and name != "node:__internal_head__")


def _whole(checkpoint: str) -> str:
    """Return a local folder's whole path, and every other name of a checkpoint as it is."""
    return str(Path(checkpoint).absolute()) if checkpoint != TINY and Path(checkpoint).is_dir() else checkpoint


def _put(tables: "queue.Queue[Any]", item: Any, over: threading.Event) -> bool:
    while not over.is_set():
        with suppress(queue.Full):
            tables.put(item, timeout=_POLL_SECONDS)
            return True
    return False


def _first_line(error: BaseException) -> str:
    """Return what went wrong on a node: of Ray's long traceback the last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:_LINE]
