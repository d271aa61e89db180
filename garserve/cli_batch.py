"""`garserve batch` (floor 8)."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from garserve.checkpoint import TINY
from garserve.cli_batch_options import (
    CategoryOption,
    CocoOption,
    EachRegionOption,
    EngineCpusOption,
    EngineGpusOption,
    EnginesOption,
    FirstOption,
    FormatOption,
    GroupGapOption,
    GroupOption,
    IdsOption,
    ImagesOption,
    InFlightOption,
    InputOption,
    MasksOption,
    MaxAreaOption,
    MaxErrorsOption,
    MetricsOption,
    MinAreaOption,
    MixOption,
    OutputOption,
    ParquetOption,
    QuestionOption,
    RayOption,
    RestartsOption,
    RetryOption,
    ShardOption,
    SystemOption,
    TemperatureOption,
    WorkersOption,
)
from garserve.cli_batch_targets import Targets
from garserve.cli_options import (
    Backend,
    BoxScaleOption,
    CheckpointOption,
    EngineOption,
    JsonOption,
    MaxTilesOption,
    MaxTokensOption,
    TileCacheOption,
    VerboseOption,
    VisionBackendOption,
    VisionModelOption,
    parse_engine_options,
)
from garserve.cli_shared import console, engine_options, load_engine, status_console
from garserve.errors import RequestError

if TYPE_CHECKING:
    from garserve.batch.filters import Filters
    from garserve.batch.limits import Stop
    from garserve.batch.ray_cluster import Engines
    from garserve.batch.run import Plan
    from garserve.batch.totals import Totals
    from garserve.engine import Engine

SOME_ERRORS, STOPPED, INTERRUPTED = 1, 3, 130


def batch(
    input_path: InputOption,
    output: OutputOption,
    checkpoint: CheckpointOption = TINY,
    form: FormatOption = None,
    images: ImagesOption = None,
    masks: MasksOption = None,
    category: CategoryOption = None,
    min_area: MinAreaOption = None,
    max_area: MaxAreaOption = None,
    ids: IdsOption = None,
    limit: FirstOption = None,
    shard: ShardOption = None,
    question: QuestionOption = None,
    system: SystemOption = None,
    each_region: EachRegionOption = False,
    group: GroupOption = 1,
    group_gap: GroupGapOption = 0.1,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    max_num_tiles: MaxTilesOption = None,
    box_scale: BoxScaleOption = None,
    tile_cache_gb: TileCacheOption = None,
    workers: WorkersOption = None,
    in_flight: InFlightOption = 128,
    max_errors: MaxErrorsOption = None,
    restarts: RestartsOption = 2,
    mix: MixOption = False,
    retry_errors: RetryOption = False,
    coco: CocoOption = None,
    parquet: ParquetOption = None,
    metrics_file: MetricsOption = None,
    ray: RayOption = None,
    engines: EnginesOption = None,
    engine_cpus: EngineCpusOption = None,
    engine_gpus: EngineGpusOption = None,
    backend: Backend = "vllm",
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer every request of a data set, each exactly once, whatever happens in between.

    The same command goes on where it was stopped: after Ctrl-C (once: what runs is finished; twice: at once), a crash
    or a full disk. What cannot be answered becomes a row with an error. With --ray, a cluster answers, and the loss of
    a process or of a node costs what it was about to answer, which others answer again.

    Exit code: 0 all is answered, 1 some rows are errors, 2 nothing was begun (or a file beside the output could not be
    written at the end), 3 stopped early, 130 interrupted.
    """
    from garserve.batch.identity import vision_identity
    from garserve.batch.limits import Limits, Stop
    from garserve.batch.prepare import Preparation
    from garserve.batch.progress import summary
    from garserve.batch.run import Plan
    from garserve.batch.source import Reading
    from garserve.checkpoint import resolve

    plan = Plan(
        input=input_path,
        output=output,
        preparation=Preparation(
            folder=str(resolve(checkpoint)),
            max_num_tiles=max_num_tiles,
            box_scale=box_scale,
            group=group,
            group_gap=group_gap,
            question=question,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        ),
        format=form,
        reading=Reading(images, masks, each_region),
        filters=_filters(category, min_area, max_area, ids, limit, shard),
        limits=Limits(in_flight, max_errors, restarts),
        workers=(1 if ray else min((os.cpu_count() or 2) // 2, 8)) if workers is None else workers,
        mix=mix,
        retry_errors=retry_errors,
        vision=vision_identity(vision_backend, vision_model),
    )
    targets = Targets(coco, parquet, metrics_file)
    targets.check(plan, ids)
    cluster = _engines(ray, engines, engine_cpus, engine_gpus)
    choices: dict[str, Any] = {"max_num_tiles": max_num_tiles, "box_scale": box_scale, "tile_cache_gb": tile_cache_gb}
    choices |= {"vision_backend": vision_backend, "vision_model": vision_model}
    stop = Stop()
    totals = _run(plan, _Loading(checkpoint, backend, engine_option, verbose, choices), cluster, stop)
    if stop.reason is None:
        targets.write(plan)
    numbers = {"output": str(output), **totals.as_json(), "stopped": stop.reason}
    targets.write_metrics(numbers)
    _tell_unmet(totals, plan.filters)
    if as_json:
        typer.echo(json.dumps(numbers))
    else:
        console.print(summary(totals, output))
    raise typer.Exit(_exit_code(stop, totals))


def _engines(ray: str | None, count: int | None, cpus: float | None, gpus: float | None) -> "Engines | None":
    """Return which cluster answers, None where this process does; RequestError for options of a cluster without one."""
    from garserve.batch.ray_cluster import Engines

    if ray is not None:
        return Engines(ray, count, cpus, gpus)
    if (count, cpus, gpus) != (None, None, None):
        raise RequestError("--engines, --engine-cpus and --engine-gpus: only with --ray")
    return None


@dataclass(frozen=True)
class _Loading:
    """How an engine is loaded; choices that are None are left to it."""

    checkpoint: str
    backend: str
    options: list[str] | None
    verbose: bool
    choices: dict[str, Any]

    def load(self) -> "Engine":
        # A GPU that has failed is lost to its process: an engine in another one can be started again.
        apart = self.backend == "vllm" and "separate_process" not in parse_engine_options(self.options)
        separate = "gpu" if apart else None
        return load_engine(
            self.checkpoint, self.backend, self.options, self.verbose, **self.choices, separate_process=separate
        )

    def elsewhere(self) -> dict[str, Any]:
        return engine_options(self.backend, self.options, self.verbose, **self.choices)


def _run(plan: "Plan", loading: _Loading, cluster: "Engines | None", stop: "Stop") -> "Totals":
    """Answer, here or on a cluster; `stop` says afterwards whether and why that ended early."""
    from garserve.batch.progress import Meter
    from garserve.batch.ray_job import RayJob
    from garserve.batch.run import run_job
    from garserve.batch.totals import Totals

    totals = Totals()
    with _signals(stop):
        if cluster is None:
            watch = partial(Meter, console=status_console)
            run_job(plan, loading.load, stop=stop, totals=totals, watch=watch)
        else:
            how = loading.checkpoint, loading.backend, loading.elsewhere()
            job = RayJob(plan, *how, cluster, stop=stop, totals=totals, verbose=loading.verbose)
            job.run(watch=lambda job: Meter(job, job, status_console))
    return totals


def _filters(
    category: list[str] | None,
    min_area: float | None,
    max_area: float | None,
    ids: Path | None,
    limit: int | None,
    shard: str | None,
) -> "Filters":
    from garserve.batch.filters import Filters, Shard

    wanted: frozenset[str] = frozenset()
    if ids is not None:
        try:
            wanted = frozenset(line.strip() for line in ids.read_text(encoding="utf-8-sig").split("\n") if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--ids {ids}: cannot be read ({error})") from None
        if not wanted:
            raise RequestError(f"--ids {ids}: expected ids, one a line, got none")
    parsed = None if shard is None else Shard.parse(shard)
    return Filters(frozenset(category or ()), min_area, max_area, wanted, limit, parsed)


@contextmanager
def _signals(stop: "Stop") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM drain the job the first time, and stop it the second.

    Where nothing looks at `stop`, as while an engine loads, the second one raises KeyboardInterrupt, which ends
    here.
    """
    from garserve.batch.limits import Halt

    def told(number: int, _: object) -> None:
        again = stop.halt is not Halt.no
        stop.tell("interrupted", Halt.now if again else Halt.drain)
        if not again:
            os.write(2, b"\nfinishing what runs; once more stops at once\n")
        elif not stop.watched:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        stop.tell("interrupted", Halt.now)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_unmet(totals: "Totals", filters: "Filters") -> None:
    if unmet := totals.unmet:
        told = f"{len(unmet)} of the {len(filters.ids)} ids never came up in the input, such as {min(unmet)!r:.80}"
        status_console.print(f"[yellow]--ids:[/] {escape(told)}", soft_wrap=True)


def _exit_code(stop: "Stop", totals: "Totals") -> int:
    if stop.reason == "interrupted":
        return INTERRUPTED
    if stop.reason is not None:
        again = "" if "--mix" in stop.reason else "; the same command goes on"
        status_console.print(f"[red]stopped:[/] {escape(stop.reason)}{again}", soft_wrap=True)
        return STOPPED
    return SOME_ERRORS if totals.errors + totals.errors_before else 0
