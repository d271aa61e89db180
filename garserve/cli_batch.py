"""`garserve batch` (floor 8)."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from garserve.batch.source import Format
from garserve.checkpoint import TINY
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
)
from garserve.cli_shared import console, load_engine, status_console
from garserve.errors import GarserveError, RequestError

if TYPE_CHECKING:
    from garserve.batch.filters import Filters
    from garserve.batch.job import Stop
    from garserve.batch.totals import Totals
    from garserve.engine import Engine

SOME_ERRORS, STOPPED, INTERRUPTED = 1, 3, 130

_SELECTION, _PROMPT, _RUN, _OUTPUT = "Selection", "Prompt", "How it runs", "Output"


def batch(
    input_path: Annotated[Path, typer.Option("--input", "-i", help="A file or a folder of images, see --format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers, one JSON object a line, as they come.")],
    checkpoint: CheckpointOption = TINY,
    form: Annotated[
        Format | None, typer.Option("--format", help="Format of the input (default: seen from the input itself).")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images that the input names.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of the masks of a folder of images.")] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(help="Only regions of this category; may be repeated.", rich_help_panel=_SELECTION),
    ] = None,
    min_area: Annotated[
        float | None, typer.Option(help="Only regions of at least so many pixels.", rich_help_panel=_SELECTION)
    ] = None,
    max_area: Annotated[
        float | None, typer.Option(help="Only regions of at most so many pixels.", rich_help_panel=_SELECTION)
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Only the ids in this file, one a line.", rich_help_panel=_SELECTION)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many regions.", rich_help_panel=_SELECTION)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only part I, from 0, of N; images stay whole.", rich_help_panel=_SELECTION),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="What to ask about regions that come without a question; the region is <Prompt0>.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.", rich_help_panel=_PROMPT)] = None,
    each_region: Annotated[
        bool,
        typer.Option(
            "--each-region",
            help="Describe every region by itself, whatever the input asks; its id is ID/0, ID/1, ...",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    group: Annotated[
        int,
        typer.Option(
            min=1,
            max=5,
            help="Ask about up to so many regions of an image in the model's form for several regions: one mask, and "
            "the image is prefilled once for all. 1 is the authors' form for one region.",
            rich_help_panel=_PROMPT,
        ),
    ] = 1,
    max_tokens: MaxTokensOption = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, rich_help_panel=_PROMPT)] = 0.0,
    max_num_tiles: MaxTilesOption = None,
    box_scale: BoxScaleOption = None,
    tile_cache_gb: TileCacheOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that read and prepare images (default: half of the cores, at most 8; 0: none).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Most requests in the engine at a time.", rich_help_panel=_RUN)
    ] = 128,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop after more error rows than this.", rich_help_panel=_RUN)
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Start an engine that died again, so many times.", rich_help_panel=_RUN)
    ] = 2,
    mix: Annotated[
        bool,
        typer.Option(
            "--mix",
            help="Go on with an output that another checkpoint, prompt or tiling began.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again what the output has as errors.", rich_help_panel=_OUTPUT)
    ] = False,
    coco: Annotated[
        Path | None,
        typer.Option(
            help="When all is answered, write the input here, COCO's JSON, with a caption in each annotation.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(help="When all is answered, write the rows here as Parquet.", rich_help_panel=_OUTPUT),
    ] = None,
    metrics_file: Annotated[
        Path | None, typer.Option(help="Write the numbers of the run here, as JSON.", rich_help_panel=_OUTPUT)
    ] = None,
    backend: Backend = "vllm",
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer every region of a data set, each exactly once, whatever happens in between.

    The same command goes on where it was stopped: after Ctrl-C (once: what runs is finished; twice: at once), a crash
    or a full disk. What cannot be answered becomes a row with an error.

    Exit code: 0 all is answered, 1 some rows are errors, 2 nothing was begun, 3 stopped early, 130 interrupted.
    """
    from garserve.batch.job import Limits, Stop
    from garserve.batch.outputs import check_coco, check_parquet, write_coco, write_parquet
    from garserve.batch.prepare import Preparation
    from garserve.batch.progress import Meter, summary
    from garserve.batch.run import Plan, run_job
    from garserve.batch.source import Reading
    from garserve.checkpoint import resolve

    plan = Plan(
        input=input_path,
        output=output,
        preparation=Preparation(
            str(resolve(checkpoint)), max_num_tiles, box_scale, group, question, system, max_tokens, temperature
        ),
        format=form,
        reading=Reading(images, masks, each_region),
        filters=_filters(category, min_area, max_area, ids, limit, shard),
        limits=Limits(in_flight, max_errors, restarts),
        workers=min((os.cpu_count() or 2) // 2, 8) if workers is None else workers,
        mix=mix,
        retry_errors=retry_errors,
        vision=None if vision_backend is None and vision_model is None else f"{vision_backend} {vision_model}",
    )
    if metrics_file is not None and not metrics_file.parent.is_dir():
        raise RequestError(f"--metrics-file {metrics_file}: no such folder: {metrics_file.parent}")
    if coco is not None:
        check_coco(input_path, form, coco)
    if parquet is not None:
        check_parquet(input_path, parquet)
    choices: dict[str, Any] = {"max_num_tiles": max_num_tiles, "box_scale": box_scale, "tile_cache_gb": tile_cache_gb}
    choices |= {"vision_backend": vision_backend, "vision_model": vision_model}

    def load() -> "Engine":
        return load_engine(checkpoint, backend, engine_option, verbose, **choices)

    stop = Stop()
    with _signals(stop):
        totals = run_job(plan, load, stop=stop, watch=lambda job, feeder: Meter(job, feeder, status_console))
    if stop.reason is None and coco is not None:
        write_coco(input_path, output, coco)
    if stop.reason is None and parquet is not None:
        write_parquet(output, parquet)
    numbers = {"output": str(output), **totals.as_json(), "stopped": stop.reason}
    if metrics_file is not None:
        _write_metrics(metrics_file, numbers)
    if as_json:
        typer.echo(json.dumps(numbers))
    else:
        console.print(summary(totals, output))
    raise typer.Exit(_exit_code(stop, totals))


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
            wanted = frozenset(line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--ids {ids}: cannot be read ({error})") from None
        if not wanted:
            raise RequestError(f"--ids {ids}: expected ids, one a line, got none")
    parsed = None if shard is None else Shard.parse(shard)
    return Filters(frozenset(category or ()), min_area, max_area, wanted, limit, parsed)


@contextmanager
def _signals(stop: "Stop") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM drain the job the first time, and stop it the second."""
    from garserve.batch.job import Halt

    def told(number: int, _: object) -> None:
        again = stop.halt is not Halt.no
        stop.tell("interrupted", Halt.now if again else Halt.drain)
        if not again:
            os.write(2, b"\nfinishing what runs; once more stops at once\n")

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_metrics(path: Path, numbers: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise GarserveError(f"--metrics-file {path}: cannot be written ({error.strerror})") from None


def _exit_code(stop: "Stop", totals: "Totals") -> int:
    if stop.reason == "interrupted":
        return INTERRUPTED
    if stop.reason is not None:
        status_console.print(f"[red]stopped:[/] {escape(stop.reason)}; the same command goes on", soft_wrap=True)
        return STOPPED
    return SOME_ERRORS if totals.errors else 0
