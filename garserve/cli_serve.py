"""`garserve serve` (floor 8)."""

import atexit
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from garserve.cli_options import (
    OWN_OPTIONS,
    BoxScaleOption,
    EngineOption,
    MaxTilesOption,
    TileCacheOption,
    VerboseOption,
    VisionBackendOption,
    VisionModelOption,
    parse_engine_options,
)
from garserve.errors import RequestError

_ACCESS, _LIMITS, _IMAGES = "Access", "Limits, for each API process", "Images from elsewhere"
_MIB = 1024 * 1024
_MOST_MIB = 1024 * 1024  # a TiB; what is more is a slip


def _finite(value: float) -> float:
    """Refuse "inf", which is no number of bytes or seconds, and "nan", which older typers find in every range."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


def serve(
    checkpoint: Annotated[
        str, typer.Argument(help="GAR checkpoint: a folder, a Hugging Face repo id, or tiny, the small one.")
    ],
    vllm_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM ARGUMENTS]", help="What `vllm serve` takes, after a --.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model (default: the checkpoint's last part).")
    ] = None,
    api_workers: Annotated[int, typer.Option(min=1, help="API processes over one engine.")] = 1,
    log_format: Annotated[Literal["json", "text"], typer.Option(help="Form of the log's lines.")] = "json",
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, callback=_finite, help="After SIGTERM, answers in work have so long to finish."),
    ] = 60,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with keys, one a line, besides GARSERVE_API_KEY. Requests need one.", rich_help_panel=_ACCESS
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests in work or waiting; more get 429.", rich_help_panel=_LIMITS)
    ] = 256,
    request_seconds: Annotated[
        float, typer.Option(min=0, help="Longest time of an answer; 0: none.", rich_help_panel=_LIMITS)
    ] = 300,
    body_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest time for a body to arrive.", rich_help_panel=_LIMITS)
    ] = 30,
    send_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest time for a client to take a piece.", rich_help_panel=_LIMITS)
    ] = 60,
    max_body_mb: Annotated[
        float,
        typer.Option(min=0.001, max=_MOST_MIB, callback=_finite, help="Largest body, MiB.", rich_help_panel=_LIMITS),
    ] = 32,
    max_image_mb: Annotated[
        float,
        typer.Option(
            min=0.001, max=_MOST_MIB, callback=_finite, help="Largest image file, MiB.", rich_help_panel=_LIMITS
        ),
    ] = 20,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels of an image, seen before decoding.", rich_help_panel=_LIMITS)
    ] = 50_000_000,
    max_regions: Annotated[
        int, typer.Option(min=1, help="Most regions of a description.", rich_help_panel=_LIMITS)
    ] = 256,
    max_points: Annotated[int, typer.Option(min=3, help="Most points of a region.", rich_help_panel=_LIMITS)] = 10_000,
    prepare_threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="Threads that read images (default: half of the cores, 2 to 8).",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = 0,
    image_host: Annotated[
        list[str] | None,
        typer.Option(help="Fetch http(s) images from this host; may be repeated.", rich_help_panel=_IMAGES),
    ] = None,
    image_folder: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Read file:// images from below this folder.", rich_help_panel=_IMAGES),
    ] = None,
    max_num_tiles: MaxTilesOption = None,
    box_scale: BoxScaleOption = None,
    tile_cache_gb: TileCacheOption = None,
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    engine_option: EngineOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Serve a checkpoint: OpenAI's chat with regions, descriptions of regions, and a page to try it.

    Exit code: 0 after SIGTERM or Ctrl-C (130 while it starts), 1 when the engine was lost, 2 when nothing was begun.
    """
    from garserve.serving.launch import Launch
    from garserve.serving.launch import serve as run
    from garserve.serving.settings import Settings, folder_of_images

    chosen: dict[str, Any] = {
        "max_body_bytes": int(max_body_mb * _MIB),
        "max_image_bytes": int(max_image_mb * _MIB),
        "max_pixels": max_pixels,
        "max_regions": max_regions,
        "max_points": max_points,
        "max_queue": max_queue,
        "body_seconds": body_seconds,
        "send_seconds": send_seconds,
        "request_seconds": request_seconds,
        "drain_seconds": drain_seconds,
        "image_hosts": tuple(image_host or ()),
        "image_folder": None if image_folder is None else folder_of_images(image_folder, "--image-folder"),
        "prepare_threads": prepare_threads,
        "log_format": log_format,
    }
    settings = replace(Settings.from_environment(given=chosen), **chosen)
    if api_key_file is not None:
        settings = replace(settings, api_keys=(*settings.api_keys, *_keys(api_key_file)))
    launch = Launch(
        checkpoint=checkpoint,
        settings=settings,
        host=host,
        port=port,
        model_name=model_name,
        api_workers=api_workers,
        max_num_tiles=max_num_tiles,
        box_scale=box_scale,
        tile_cache_gb=tile_cache_gb,
        vision_backend=vision_backend,
        vision_model=vision_model,
        engine_options=parse_engine_options(engine_option, OWN_OPTIONS),
        vllm_arguments=tuple(vllm_arguments or ()),
        verbose=verbose,
    )
    _leave(run(launch))


def _leave(code: int) -> NoReturn:
    """End this process, in which nothing runs any more, without taking its interpreter apart.

    That takes seconds with all of vLLM in it, and Triton tells of hundreds of leaks on the way.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keys(path: Path) -> tuple[str, ...]:
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--api-key-file {path}: cannot be read ({type(error).__name__})") from None
    if not keys:
        raise RequestError(f"--api-key-file {path}: expected a key a line, got none")
    return keys
