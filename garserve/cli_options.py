"""Options that commands share, and how their texts become regions and engine options (floor 6)."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from garserve.errors import RegionError, RequestError
from garserve.inputs.regions import Region

CheckpointOption = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        "-c",
        envvar="GARSERVE_CHECKPOINT",
        help="GAR checkpoint: a folder, a Hugging Face repo id, or tiny, the small one that comes with garserve.",
    ),
]
Backend = Annotated[
    Literal["vllm", "reference"], typer.Option(help="Engine: vLLM, or the slow plain-PyTorch reference.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
MaxTilesOption = Annotated[
    int | None, typer.Option(min=1, max=36, help="Most tiles an image is cut into (default: the checkpoint's own).")
]
BoxScaleOption = Annotated[
    Literal["released", "geometric"] | None,
    typer.Option(help="How a box becomes feature cells (default: the checkpoint's own)."),
]
TileCacheOption = Annotated[
    float | None,
    typer.Option(min=0, help="Memory in GB for features of computed tiles (default: the backend's own)."),
]
VisionBackendOption = Annotated[
    str | None,
    typer.Option(
        metavar="torch|onnx[:PROVIDER]",
        help="What computes tiles: torch, or the exported tower in ONNX Runtime. "
        "[dim](default: torch; for a large tower on a CPU the faster one, measured once)[/]",
    ),
]
VisionModelOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of [bold]garserve export vision[/] (default: a float32 export, made on first use and kept).",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Ask only this many questions, taken evenly from all.")]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An option of the backend, such as max_model_len=8192; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables and text.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show vLLM's log.")]

BoxOption = Annotated[list[str] | None, typer.Option(help="Region: a box x1,y1,x2,y2 in pixels.")]
XywhOption = Annotated[list[str] | None, typer.Option(help="Region: a box x,y,width,height in pixels.")]
MaskOption = Annotated[list[str] | None, typer.Option(help="Region: a mask image of the image's size.")]
PolygonOption = Annotated[list[str] | None, typer.Option(help="Region: a polygon x1,y1,x2,y2,x3,y3,... in pixels.")]
PointsOption = Annotated[list[str] | None, typer.Option(help="Region: points x1,y1,x2,y2,..., a disc around each.")]
ScribbleOption = Annotated[list[str] | None, typer.Option(help="Region: a line through x1,y1,x2,y2,...")]
RleOption = Annotated[list[str] | None, typer.Option(help="Region: a COCO RLE as JSON, or a file that holds it.")]
RadiusOption = Annotated[float, typer.Option(help="Radius of the discs of --points in pixels.")]
WidthOption = Annotated[float, typer.Option(help="Width of the line of --scribble in pixels.")]
ClipOption = Annotated[bool, typer.Option("--clip", help="Cut boxes at the image's edge instead of refusing them.")]
AskOption = Annotated[str | None, typer.Option(help="A question that names the regions as <Prompt0>, <Prompt1>, ...")]
ImageOutOption = Annotated[Path | None, typer.Option(help="Save a picture of the regions and the answers here.")]

# Of `garserve.load`, and not the backend's: most commands have options for some or all of them.
OWN_OPTIONS = ("max_num_tiles", "box_scale", "tile_cache_gb", "vision_backend", "vision_model")
_FLAGS = {"checkpoint": "-c, or the command's argument"}  # where it is not --NAME

_REGION_OPTIONS = ("box", "xywh", "mask", "polygon", "points", "scribble", "rle")
_ORDER = "garserve.region_order"


class RegionCommand(TyperCommand):
    """A command that remembers in which order region options of different kinds were given; click forgets it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the order, then parse as always."""
        names = {f"--{name}": name for name in _REGION_OPTIONS}
        ctx.meta[_ORDER] = [names[arg.split("=", 1)[0]] for arg in args if arg.split("=", 1)[0] in names]
        return super().parse_args(ctx, args)


def parse_regions(context: typer.Context, *, radius: float, width: float, clip: bool) -> list[Region]:
    """Return the regions of a RegionCommand in the order in which they were given.

    Raises RequestError where there is none, RegionError naming the option where one cannot be read.
    """
    left = {name: list(context.params.get(name) or []) for name in _REGION_OPTIONS}
    options: dict[str, dict[str, Any]] = {
        "points": {"radius": radius},
        "scribble": {"width": width},
        "box": {"clip": clip},
        "xywh": {"clip": clip},
    }
    order = [name for name in context.meta[_ORDER] if left[name]]
    regions = [Region.parse({name: _value(name, left[name].pop(0)), **options.get(name, {})}) for name in order]
    if not regions:
        raise RequestError("no region given: use --box, --mask, --polygon, --points, --scribble, --xywh or --rle")
    return regions


def _value(name: str, text: str) -> Any:
    if name == "mask":
        return text
    if name == "rle":
        return _rle(text)
    try:
        numbers = [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise RegionError(f"--{name}: expected numbers separated by commas, got {text!r:.80}") from None
    if name in ("points", "scribble"):
        if len(numbers) % 2:
            raise RegionError(f"--{name}: expected pairs x,y, got {len(numbers)} numbers")
        return [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
    return numbers


def _rle(text: str) -> Any:
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RegionError(f"--rle {text[:80]}: not text; expected JSON or a file that holds it") from None
        except OSError as error:
            raise RegionError(f"--rle {text[:80]}: {error.strerror}; expected JSON or a file that holds it") from None
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RegionError(f"--rle: not JSON ({error})") from None


def parse_engine_options(options: list[str] | None, own: Collection[str] = ()) -> dict[str, Any]:
    """Read NAME=VALUE pairs, values as JSON where they are JSON and as texts otherwise.

    `own` are names that the command gives to the engine itself. Raises RequestError for one of them, and for what is no
    pair.
    """
    parsed: dict[str, Any] = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"--engine-option: expected NAME=VALUE, got {option!r:.80}")
        if name in own:
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise RequestError(f"--engine-option {name}: expected an option of the backend; use {flag}")
        try:
            parsed[name] = json.loads(value)
        except (ValueError, RecursionError):
            parsed[name] = value
    return parsed


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of showing: control characters other than the line break."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
