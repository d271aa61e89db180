"""`garserve encode`: the vision half by itself (floor 8)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from garserve.checkpoint import TINY
from garserve.cli_options import (
    BoxScaleOption,
    CheckpointOption,
    JsonOption,
    MaxTilesOption,
    TileCacheOption,
    VisionBackendOption,
    VisionModelOption,
)
from garserve.cli_shared import console, status_console
from garserve.errors import GarserveError, first_line

if TYPE_CHECKING:
    from garserve.model.encoder import RegionEncoder


def encode(
    input_file: Annotated[
        Path,
        typer.Option("--input", "-i", exists=True, dir_okay=False, help="Requests, a JSON object a line."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the embeddings and their requests.jsonl.")],
    checkpoint: CheckpointOption = TINY,
    max_num_tiles: MaxTilesOption = None,
    box_scale: BoxScaleOption = None,
    tile_cache_gb: TileCacheOption = None,
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where tiles are computed; auto is a GPU where one is.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compute images and regions to embeddings, without a decoder, for an engine elsewhere that takes them instead.

    Writes a safetensors file for each image with its regions, and requests.jsonl, the same requests with these files
    in the place of pixels: [bold]garserve batch -i FOLDER/requests.jsonl[/] answers them. Bad lines go to
    errors.jsonl.

    Exit code: 0 all is encoded, 1 some lines were bad.
    """
    from garserve.batch.encode import Encoded, FileEncoder, check_folder, run_encode
    from garserve.batch.lines import count_lines
    from garserve.checkpoint import Checkpoint
    from garserve.export.choice import choose_vision, open_vision
    from garserve.export.source import load_encoder
    from garserve.inputs.processor import Processor
    from garserve.model.encoder import RegionEncoder
    from garserve.model.fingerprint import vision_fingerprint
    from garserve.model.tile_cache import DEFAULT_GB, TileCache

    check_folder(input_file, output)
    if device == "cuda":
        _check_gpu()
    opened = Checkpoint.open(checkpoint)
    config = opened.config if box_scale is None else opened.config.with_box_scale(box_scale)
    processor = Processor(opened.folder, config, max_num_tiles=max_num_tiles)
    choice = choose_vision(opened, vision_backend, vision_model, device=None if device == "auto" else device)
    with status_console.status(f"Loading {checkpoint} ..."):
        exported = None if choice is None else open_vision(opened, choice)
        encoder = load_encoder(opened) if exported is None else RegionEncoder(config, vision=exported)
        tower = _place(encoder, device, config.dtype) if exported is None else exported.info.tower
        encoder.tile_cache = TileCache(DEFAULT_GB if tile_cache_gb is None else tile_cache_gb)
        files = FileEncoder(encoder, processor, vision_fingerprint(opened), output, tower=tower)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=status_console) as progress:
        task = progress.add_task("rows", total=count_lines(input_file))

        def advance(done: Encoded) -> None:
            progress.update(task, completed=done.rows, description=f"rows, {done.errors} errors")

        done = run_encode(files, input_file, output, on_row=advance)
    tiles = encoder.tile_cache.counts
    if as_json:
        counted = {"tiles": tiles.asked, "tiles_computed": tiles.computed}
        typer.echo(json.dumps({"output": str(output), **vars(done), **counted}))
    else:
        console.print(
            f"{done.rows} rows, {done.errors} of them errors, {done.files} files, {tiles.computed} of {tiles.asked} "
            f"tiles computed: {escape(str(output))}"
        )
    if done.errors:
        raise typer.Exit(1)


def _check_gpu() -> None:
    """Raise GarserveError where no GPU can be used, before a checkpoint is fetched or loaded for one."""
    import torch

    with _gpu_errors():
        torch.empty(1, device="cuda")


def _place(encoder: "RegionEncoder", device: str, dtype: str) -> str:
    """Move a tower to where it computes, on a GPU in the checkpoint's dtype; return what its files say of it.

    Features of another dtype than float32 are others, in files of other names.
    """
    import torch

    from garserve.model.device import has_gpu

    if device == "cpu" or (device == "auto" and not has_gpu()):
        return ""
    with _gpu_errors():
        encoder.place("cuda", getattr(torch, dtype))
    return "" if dtype == "float32" else f"torch {dtype}"


@contextmanager
def _gpu_errors() -> Iterator[None]:
    try:
        yield
    except (AssertionError, RuntimeError) as error:  # torch has no CUDA, or it has no memory left
        why = first_line(error)
        raise GarserveError(f"--device cuda: the GPU cannot be used ({why}); --device cpu does without") from None
