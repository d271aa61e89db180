"""`garserve bench`: how fast a checkpoint is on this machine, and how near to what the machine can do (floor 8)."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import randrange
from typing import TYPE_CHECKING, Annotated

import typer

from garserve.bench.options import (
    AnswerOption,
    DtypeOption,
    GroupOption,
    ImagesOption,
    KindOption,
    RegionsOption,
    RoundsOption,
    SaveOption,
    SizeOption,
    check_targets,
    chosen,
    refuse,
)
from garserve.checkpoint import TINY, resolve
from garserve.cli_options import (
    Backend,
    CheckpointOption,
    EngineOption,
    JsonOption,
    MaxTilesOption,
    TileCacheOption,
    VerboseOption,
    parse_engine_options,
)
from garserve.cli_shared import console, open_engine, status_console, write_asked
from garserve.errors import GarserveError

if TYPE_CHECKING:
    from garserve.bench.result import Result

if TYPE_CHECKING:
    pass

benchmarks = typer.Typer(no_args_is_help=True)


@benchmarks.callback()
def root() -> None:
    """Measure latency, throughput and their parts, with the machine, the versions and, where there is one, a limit."""


@benchmarks.command()
def latency(
    checkpoint: CheckpointOption = TINY,
    workload: KindOption = "stream",
    images: ImagesOption = 9,
    size: SizeOption = "640x480",
    max_tokens: AnswerOption = 64,
    trace: Annotated[
        Path | None, typer.Option(help="Write the last request's spans here, in Chrome's trace format.")
    ] = None,
    max_num_tiles: MaxTilesOption = None,
    backend: Backend = "vllm",
    tile_cache_gb: TileCacheOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    save: SaveOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Answer requests one after the other: preprocess, vision, replay, prefill, TTFT, ITL, end to end.

    vLLM schedules without async_scheduling, by which the first decoding step
    would be counted in TTFT, unless an option of the engine says otherwise.
    """
    from garserve.bench.latency import latency as measure_latency
    from garserve.bench.workload import make_workload, parse_size
    from garserve.tracing import write_chrome_trace

    check_targets(save, trace)
    if backend == "vllm" and "async_scheduling" not in parse_engine_options(engine_option):
        engine_option = [*(engine_option or []), "async_scheduling=false"]
    asked = make_workload(workload, images + 1, parse_size(size), max_tokens=max_tokens)
    each = len(asked.requests) // (images + 1)
    with open_engine(
        checkpoint, backend, engine_option, verbose, max_num_tiles=max_num_tiles, tile_cache_gb=tile_cache_gb
    ) as engine:
        conditions = f"{checkpoint} ({backend}), {workload}, {size} pixels"
        conditions += chosen(max_num_tiles, tile_cache_gb, engine_option, max_tokens)
        result, spans = measure_latency(engine, asked.requests[each:], asked.requests[0], conditions)
    _show(result, as_json, save, trace, lambda path: write_chrome_trace(path, spans))


@benchmarks.command()
def throughput(
    context: typer.Context,
    checkpoint: CheckpointOption = TINY,
    workload: KindOption = "dense",
    images: ImagesOption = 4,
    size: SizeOption = "640x480",
    regions: RegionsOption = None,
    group: GroupOption = 1,
    max_tokens: AnswerOption = 64,
    in_flight: Annotated[int, typer.Option(min=1, help="Most requests at a time.")] = 64,
    max_num_tiles: MaxTilesOption = None,
    backend: Backend = "vllm",
    tile_cache_gb: TileCacheOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    save: SaveOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Answer many requests together: answers, images and tokens a second."""
    from garserve.bench.real import real_workload
    from garserve.bench.throughput import throughput as measure_throughput
    from garserve.bench.workload import make_workload, parse_size

    check_targets(save)
    pixels = parse_size(size)
    if regions is None:
        asked = make_workload(workload, images, pixels, max_tokens=max_tokens, group=group)
    else:
        reason = "without --regions, whose images are taken as they are and whose regions are asked about one by one"
        refuse(context, ("workload", "images", "size", "group"), reason)
        asked = real_workload(regions, max_tokens=max_tokens)
    warm = make_workload("stream", 1, pixels, max_tokens=max_tokens, first=images).requests[0]
    with open_engine(
        checkpoint, backend, engine_option, verbose, max_num_tiles=max_num_tiles, tile_cache_gb=tile_cache_gb
    ) as engine:
        pictures = f"groups of {group}, {size} pixels" if regions is None else "one by one"
        conditions = f"{checkpoint} ({backend}), {asked.name}, {pictures}"
        conditions += chosen(max_num_tiles, tile_cache_gb, engine_option, max_tokens)
        result = measure_throughput(engine, asked, warm, conditions, in_flight=in_flight)
    _show(result, as_json, save)


@benchmarks.command()
def preprocess(
    checkpoint: CheckpointOption = TINY,
    size: SizeOption = "4000x3000",
    regions: Annotated[int, typer.Option(min=1, help="Regions of the image.")] = 20,
    max_num_tiles: MaxTilesOption = None,
    rounds: RoundsOption = 3,
    as_json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Prepare requests about one photograph: masks, tiles and prompt, without a model."""
    from garserve.bench.preprocess import preprocess as measure_preprocess
    from garserve.bench.workload import parse_size

    check_targets(save)
    pixels = parse_size(size)
    _show(measure_preprocess(resolve(checkpoint), pixels, regions, max_num_tiles, rounds), as_json, save)


@benchmarks.command()
def startup(
    checkpoint: CheckpointOption = TINY,
    backend: Backend = "vllm",
    runs: RoundsOption = 3,
    as_json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Start an engine in fresh processes: import, load, first answer."""
    from garserve.bench.startup import startup as measure_startup

    check_targets(save)
    with status_console.status(f"Starting {checkpoint} ({backend}) {runs} times ..."):
        result = measure_startup(checkpoint, backend, runs)
    _show(result, as_json, save)


@benchmarks.command()
def replay(
    checkpoint: CheckpointOption = TINY,
    grid: Annotated[str, typer.Option(metavar="ACROSSxDOWN", help="Tiles of the image.")] = "4x4",
    dtype: DtypeOption = "float32",
    rounds: RoundsOption = 9,
    as_json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Replay 1 to 100 regions of an image of this checkpoint's shape; peers are in benchmarks/replay.py."""
    from garserve.bench.operators import replay as measure_replay
    from garserve.bench.workload import parse_pair
    from garserve.config import read_config

    check_targets(save)
    _show(measure_replay(read_config(resolve(checkpoint)), parse_pair("--grid", grid), dtype, rounds), as_json, save)


@benchmarks.command()
def vision(
    checkpoint: CheckpointOption = TINY,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles at once.")] = 4,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the tower (default: all).")] = None,
    rounds: RoundsOption = 5,
    as_json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Run tiles through a tower of this checkpoint's shape; peers are in benchmarks/vision.py."""
    from garserve.bench.operators import vision as measure_vision
    from garserve.config import read_config

    check_targets(save)
    _show(measure_vision(read_config(resolve(checkpoint)), depth, tiles, rounds), as_json, save)


@benchmarks.command()
def serve(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="A running server that speaks OpenAI's chat completions.")],
    model: Annotated[str, typer.Option(help="The model's name on the server.")] = "tiny",
    workload: KindOption = "dense",
    images: ImagesOption = 4,
    size: SizeOption = "640x480",
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests sent a second, however many are unanswered (an open loop)."),
    ] = None,
    clients: Annotated[
        int, typer.Option(min=1, help="Clients of a closed loop: each sends its next request after an answer.")
    ] = 8,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="TTFT limit in seconds for goodput: until the first text.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="TPOT limit in seconds for goodput: mean time between tokens.")
    ] = None,
    slo_e2e: Annotated[
        float | None, typer.Option(min=0, help="E2E limit in seconds for goodput: until the answer's last chunk.")
    ] = None,
    max_tokens: AnswerOption = 64,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=9999,
            help="Seed of images, regions and arrival times (default: new; a repeated seed finds caches warm).",
        ),
    ] = None,
    as_json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Load a running server: TTFT, TPOT, ITL, E2E, and how many requests a second kept the limits.

    Chunks are counted as in vllm bench serve, but from the first text on: TTFT
    there ends with the chunk that names the role, which has no token. Without
    [bold]--rate[/], the load is a closed loop. A server with keys gets that of
    GARSERVE_API_KEY. Needs httpx ([bold]pip install 'garserve\\[serve][/]').
    """
    if find_spec("httpx") is None:
        raise GarserveError("bench serve needs httpx: pip install 'garserve[serve]'")
    if rate is not None:
        refuse(context, ("clients",), "without --rate, which sends requests at its own times")
    from garserve.bench.load import bodies
    from garserve.bench.serve import Limits
    from garserve.bench.serve import serve as measure_serve
    from garserve.bench.workload import PER_SEED, make_workload, parse_size

    check_targets(save)
    seed = randrange(10_000) if seed is None else seed
    first = seed * PER_SEED  # a server remembers what it has seen: other pictures for each seed
    pixels = parse_size(size)
    asked = make_workload(workload, images, pixels, max_tokens=max_tokens, first=first)
    warm = bodies(make_workload("stream", 1, pixels, max_tokens=max_tokens, first=first + images), model, max_tokens)
    limits, requests = Limits(slo_ttft, slo_tpot, slo_e2e), bodies(asked, model, max_tokens)
    conditions = f"{asked.name}, {asked.images} images of {size} pixels, --seed {seed}, --max-tokens {max_tokens}"
    result = measure_serve(url, requests, conditions, limits, warm=warm, rate=rate, clients=clients, seed=seed)
    _show(result, as_json, save)


def _show(
    result: "Result",
    as_json: bool,
    save: Path | None,
    trace: Path | None = None,
    write_trace: Callable[[Path], None] = lambda path: None,
) -> None:
    """Save and print figures, then write the trace: what took minutes hangs on no other file and on no terminal.

    Raises GarserveError, last of all, for a file that could not be written.
    """
    wrong = write_asked("--save", save, result.write)
    if as_json:
        typer.echo(json.dumps(result.document(), indent=2))
    else:
        result.show(console)
    wrong += write_asked("--trace", trace, write_trace)
    if wrong:
        raise GarserveError("; ".join(wrong))
