"""Options that commands share, and how their texts become regions and engine options (floor 6)."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from garserve.errors import RegionError, RequestError
from garserve.inputs.regions import Region

CheckpointOption = Annotated[
    str,
    typer.Option(
        "--checkpoint", "-c", envvar="GARSERVE_CHECKPOINT", help="GAR checkpoint: a folder, or a Hugging Face repo id."
    ),
]
Backend = Annotated[Literal["vllm", "reference"], typer.Option(help="What decodes.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
MaxTilesOption = Annotated[
    int | None, typer.Option(min=1, max=36, help="Most tiles an image is cut into [checkpoint's own].")
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An option of the backend, such as max_model_len=8192; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show vLLM's log.")]

_REGION_OPTIONS = ("box", "xywh", "mask", "polygon", "points", "scribble", "rle")
_ORDER = "garserve.region_order"


class RegionCommand(TyperCommand):
    """A command that remembers in which order region options of different kinds were given; click forgets it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the order, then parse as always."""
        names = {f"--{name}": name for name in _REGION_OPTIONS}
        ctx.meta[_ORDER] = [names[arg.split("=", 1)[0]] for arg in args if arg.split("=", 1)[0] in names]
        return super().parse_args(ctx, args)


def parse_regions(context: typer.Context) -> list[Region]:
    """Return the regions of a RegionCommand in the order in which they were given.

    Raises RequestError where there is none, RegionError naming the option where one cannot be read.
    """
    left = {name: list(context.params.get(name) or []) for name in _REGION_OPTIONS}
    regions = [_region(name, left[name].pop(0)) for name in context.meta[_ORDER] if left[name]]
    if not regions:
        raise RequestError("no region given: use --box, --mask, --polygon, --points, --scribble, --xywh or --rle")
    return regions


def _region(name: str, text: str) -> Region:
    if name == "mask":
        return Region.from_mask(text)
    if name == "rle":
        return Region.from_rle(_rle(text))
    try:
        numbers = [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise RegionError(f"--{name}: expected numbers separated by commas, got {text!r:.80}") from None
    if name in ("points", "scribble"):
        if len(numbers) % 2:
            raise RegionError(f"--{name}: expected pairs x,y, got {len(numbers)} numbers")
        pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        return Region.from_points(pairs) if name == "points" else Region.from_scribble(pairs)
    if name == "polygon":
        return Region.from_polygon(numbers)
    return Region.from_box(numbers) if name == "box" else Region.from_xywh(numbers)


def _rle(text: str) -> Any:
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise RegionError(f"--rle {text[:80]}: {error.strerror}; expected JSON or a file that holds it") from None
    try:
        return json.loads(source)
    except ValueError as error:
        raise RegionError(f"--rle: not JSON ({error})") from None


def parse_engine_options(options: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE pairs, values as JSON where they are JSON and as texts otherwise."""
    parsed: dict[str, Any] = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"--engine-option: expected NAME=VALUE, got {option!r:.80}")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
