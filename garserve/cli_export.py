"""`garserve export`: the vision half as ONNX models, and checks of them (floor 8)."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from garserve.checkpoint import TINY
from garserve.cli_options import CheckpointOption, JsonOption
from garserve.cli_shared import console, status_console

exports = typer.Typer(no_args_is_help=True)
OutOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the models; made where it is missing.")]
CheckpointArgument = Annotated[
    str, typer.Argument(help="GAR checkpoint: a folder, a Hugging Face repo id, or tiny.", show_default=False)
]


class _Dtype(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class _Scale(StrEnum):
    released = "released"
    geometric = "geometric"


@exports.callback()
def root() -> None:
    """Write the vision half of a checkpoint as ONNX models, and check them. Needs \\[onnx]."""


@exports.command()
def vision(
    checkpoint: CheckpointArgument,
    output: OutOption,
    dtype: Annotated[
        _Dtype,
        typer.Option(help="fp16 computes in float16; bf16 stores weights in bfloat16; int8 has 8-bit matrix products."),
    ] = _Dtype.fp32,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Image, or folder of images, to calibrate int8 on; may be repeated."),
    ] = None,
    opset: Annotated[
        int, typer.Option(min=18, max=23, help="23 has attention as one operator; older runtimes want an older one.")
    ] = 23,
    fuse: Annotated[bool, typer.Option("--fuse", help="Also use operators that ONNX Runtime alone has.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write vision.onnx: uint8 tiles and masks in, features out, for any number of tiles."""
    from garserve.checkpoint import Checkpoint
    from garserve.export.samples import image_files, photo_tiles
    from garserve.export.vision import export_vision

    opened = Checkpoint.open(checkpoint)
    with status_console.status(f"Exporting {checkpoint} ({dtype}) ..."):
        calibration = list(photo_tiles(opened.config, image_files(calibrate or [])))
        done = export_vision(opened, output, dtype=dtype.value, opset=opset, calibration=calibration, fuse=fuse)
    if as_json:
        typer.echo(
            json.dumps(
                {"model": str(output / "vision.onnx"), "error": done.error, "fused": done.fused, **vars(done.info)}
            )
        )
        return
    fused = "".join(f", {count} {name}" for name, count in done.fused.items())
    console.print(
        f"{escape(str(output / 'vision.onnx'))}: {dtype}, opset {opset}{fused}; relative error "
        f"{done.error:.1e} on random tiles, limit {done.info.tolerance:g}",
        soft_wrap=True,
    )
    for name, error in done.info.config.get("calibration_errors", {}).items():
        chosen = " (kept)" if name == done.info.config["activations"] else ""
        console.print(f"activations {name}: relative error {error:.1e} on the calibration images{chosen}")


@exports.command()
def replay(
    checkpoint: CheckpointArgument,
    output: OutOption,
    box_scale: Annotated[
        _Scale | None, typer.Option(help="How a box becomes feature cells (default: the checkpoint's own).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write replay.onnx: features of an image's tiles, boxes and the grid in, tokens of each region out."""
    from garserve.checkpoint import Checkpoint
    from garserve.export.replay import export_replay

    info = export_replay(Checkpoint.open(checkpoint), output, box_scale=box_scale.value if box_scale else None)
    if as_json:
        typer.echo(json.dumps({"model": str(output / "replay.onnx"), **vars(info)}))
    else:
        console.print(f"{escape(str(output / 'replay.onnx'))}: {info.config['box_scale']} boxes, opset {info.opset}")


@exports.command()
def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the models.")],
    checkpoint: CheckpointOption = TINY,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Execution provider, such as CPU; may be repeated (default: all that are here)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check models against their checkpoint: names, dynamic axes, shapes, then values on random and real tiles.

    Exits with 1 when a check fails.
    """
    from garserve.checkpoint import Checkpoint
    from garserve.export.verify import verify as run_checks
    from garserve.model.onnx_vision import find_provider

    providers = [find_provider(name) for name in provider] if provider else None
    with status_console.status(f"Checking {folder} ..."):
        checks = list(run_checks(folder, Checkpoint.open(checkpoint), providers=providers))
    if as_json:
        typer.echo(json.dumps([check.as_json() for check in checks], indent=2))
    else:
        table = Table("model", "provider", "check", "largest", "relative", "limit", "", title="Exported models")
        for one in checks:
            numbers = ("" if value is None else f"{value:.1e}" for value in (one.largest, one.relative, one.limit))
            mark = "[green]✓[/]" if one.passed else "[red]✗[/]"
            provider_name = one.provider.removesuffix("ExecutionProvider")
            table.add_row(one.model, provider_name, one.check, *numbers, f"{mark} {escape(one.note)}")
        console.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
