"""The command line (floor 9): parses arguments, shows results. Everything that computes lives below."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from garserve import __version__
from garserve.checkpoint import TINY
from garserve.cli_batch import batch
from garserve.cli_batch_options import BatchCommand
from garserve.cli_bench import benchmarks
from garserve.cli_doctor import doctor
from garserve.cli_encode import encode
from garserve.cli_eval import evaluations
from garserve.cli_export import exports
from garserve.cli_options import (
    AskOption,
    Backend,
    BoxOption,
    BoxScaleOption,
    CheckpointOption,
    ClipOption,
    EngineOption,
    ImageOutOption,
    JsonOption,
    MaskOption,
    MaxTilesOption,
    MaxTokensOption,
    PointsOption,
    PolygonOption,
    RadiusOption,
    RegionCommand,
    RleOption,
    ScribbleOption,
    VerboseOption,
    VisionBackendOption,
    VisionModelOption,
    WidthOption,
    XywhOption,
    parse_regions,
    printable,
)
from garserve.cli_report import report
from garserve.cli_serve import serve
from garserve.cli_shared import console, open_engine, status_console
from garserve.errors import GarserveError
from garserve.openmp import prefer_intel

if TYPE_CHECKING:
    from garserve.answers import Answer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(evaluations, name="eval")
app.add_typer(exports, name="export")
app.add_typer(benchmarks, name="bench")
app.command(cls=BatchCommand)(batch)
app.command()(report)
app.command()(serve)
app.command()(doctor)
app.command()(encode)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Describe regions of images, and answer questions about them, with Grasp Any Region models."""
    if version:
        console.print(__version__)
        raise typer.Exit


def _row(answer: "Answer", name: str) -> dict[str, Any]:
    return {
        "region": name,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "answer_tokens": len(answer.token_ids),
    }


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        text = escape(printable(row["text"]))
        console.print(f"[bold cyan]{escape(row['region'])}[/]  {text}", soft_wrap=True, highlight=False)


@app.command(cls=RegionCommand)
def describe(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="Image file.")],
    checkpoint: CheckpointOption = TINY,
    box: BoxOption = None,
    xywh: XywhOption = None,
    mask: MaskOption = None,
    polygon: PolygonOption = None,
    points: PointsOption = None,
    scribble: ScribbleOption = None,
    rle: RleOption = None,
    radius: RadiusOption = 8.0,
    width: WidthOption = 8.0,
    clip: ClipOption = False,
    ask: AskOption = None,
    image_out: ImageOutOption = None,
    max_tokens: MaxTokensOption = 256,
    max_num_tiles: MaxTilesOption = None,
    box_scale: BoxScaleOption = None,
    backend: Backend = "vllm",
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Describe each region of an image, or [bold]--ask[/] one question about all of them.

    Regions are numbered in the order in which they are given.
    """
    from garserve.inputs.images import load_image
    from garserve.inputs.processor import draw_masks
    from garserve.inputs.request import RegionRequest
    from garserve.pictures import check_target, save_picture

    regions = parse_regions(context, radius=radius, width=width, clip=clip)
    pixels = load_image(image)
    masks = draw_masks(regions, pixels.shape[0], pixels.shape[1])
    if ask is not None:
        RegionRequest(pixels, regions, ask).check(prompt_count=len(regions))
    if image_out is not None:
        check_target(image_out)
    choices: dict[str, Any] = {"max_num_tiles": max_num_tiles, "box_scale": box_scale}
    choices |= {"vision_backend": vision_backend, "vision_model": vision_model}
    with open_engine(checkpoint, backend, engine_option, verbose, **choices) as engine:
        if ask is None:
            with status_console.status(f"Describing {len(regions)} regions ..."):
                answers = engine.describe(pixels, regions, max_tokens=max_tokens)
            rows = [_row(answer, f"region {i}") for i, answer in enumerate(answers)]
        else:
            with status_console.status("Answering ..."):
                rows = [_row(engine.ask(pixels, regions, ask, max_tokens=max_tokens), "answer")]
    _show(rows, as_json)
    if image_out is not None:
        captions = [row["text"] for row in rows] if ask is None else []
        save_picture(image_out, pixels, masks, captions, "" if ask is None else f"{ask} {rows[0]['text']}")
        status_console.print(f"Saved {image_out}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")] = Path("demo-out"),
    backend: Backend = "vllm",
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Describe three regions of a photograph, and relate two of them; both picture and model come with garserve."""
    from garserve.demo import run_demo
    from garserve.pictures import check_target

    picture = folder / "regions.png"
    check_target(picture)
    rows = []
    with open_engine(TINY, backend, None, verbose, vision_backend=vision_backend, vision_model=vision_model) as engine:
        for name, answer in run_demo(engine, picture):
            rows.append(_row(answer, name))
    _show(rows, as_json=False)
    console.print(f"Picture: {picture}")


def main() -> None:
    """Run the command line; an error that garserve raised on purpose is one line, and exit code 2."""
    prefer_intel()
    if not {"-v", "--verbose"} & set(sys.argv):
        import warnings

        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # looks for a CUDA toolkit, and tells
    try:
        app()
    except GarserveError as error:
        status_console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
