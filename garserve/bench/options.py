"""Options that verbs of `garserve bench` share, checked and told; for `cli_bench.py`, so nothing heavy is imported."""

from collections.abc import Sequence
from os.path import realpath
from pathlib import Path
from typing import Annotated, Literal

import typer

from garserve.bench.kinds import HELP, Kind
from garserve.errors import RequestError
from garserve.targets import unwritable

KindOption = Annotated[Kind, typer.Option("--workload", help=HELP)]
ImagesOption = Annotated[int, typer.Option(min=1, help="Number of images.")]
SizeOption = Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the images in pixels.")]
RegionsOption = Annotated[
    Path | None,
    typer.Option(help='File of real masks, in the place of --workload: lines {"image": path, "regions": [...]}.'),
]
AnswerOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")]
GroupOption = Annotated[int, typer.Option(min=1, max=5, help="Regions of a dense image that share one mask.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Runs, of which the median is shown.")]
SaveOption = Annotated[Path | None, typer.Option("--save", help="Write the figures here as JSON.")]
DtypeOption = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the features.")]


def refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raise RequestError for an option that was given and would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise RequestError(f"--{name}: expected it {reason}, got {context.params[name]!r:.40}")


def check_targets(*targets: Path | None) -> None:
    """Raise RequestError for a file that could not be written, or is named twice, before anything is measured."""
    given: set[str] = set()
    for target in targets:
        if target is None:
            continue
        if wrong := unwritable(target):
            raise RequestError(f"{target}: {wrong}")
        if (real := realpath(target)) in given:
            raise RequestError(f"{target}: expected another file for each of --save and --trace, got it for both")
        given.add(real)


def chosen(tiles: int | None, cache_gb: float | None, engine: list[str] | None, tokens: int) -> str:
    """Return what of an engine's and an answer's options was chosen, for the conditions of figures."""
    given = {"--max-num-tiles": tiles, "--tile-cache-gb": cache_gb, "--max-tokens": tokens}
    told = [f"{name} {value}" for name, value in given.items() if value is not None]
    return ", ".join(["", *told, *(f"--engine-option {one}" for one in engine or [])])
