"""The options of `garserve batch` (floor 7)."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from garserve.batch.source import Format

_SELECTION, _PROMPT, _RUN, _OUTPUT, _RAY = "Selection", "Prompt", "How it runs", "Output", "On a Ray cluster"


class BatchCommand(TyperCommand):
    """A command whose `--ray` may come without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give `--ray` its value where the next word is another option, or none, then parse as always."""
        for place in reversed([i for i, arg in enumerate(args) if arg == "--ray"]):
            if place + 1 == len(args) or args[place + 1].startswith("-"):
                args.insert(place + 1, "auto")
        return super().parse_args(ctx, args)


InputOption = Annotated[Path, typer.Option("--input", "-i", help="A file or a folder of images, see --format.")]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", help="Answers, one JSON object a line, as they come; with --ray a folder of parts."),
]
FormatOption = Annotated[
    Format | None, typer.Option("--format", help="Format of the input (default: seen from the input itself).")
]
ImagesOption = Annotated[Path | None, typer.Option(help="Folder of the images that the input names.")]
MasksOption = Annotated[Path | None, typer.Option(help="Folder of the masks of a folder of images.")]
CategoryOption = Annotated[
    list[str] | None,
    typer.Option(help="Only regions of this category; may be repeated.", rich_help_panel=_SELECTION),
]
MinAreaOption = Annotated[
    float | None, typer.Option(help="Only regions of at least so many pixels.", rich_help_panel=_SELECTION)
]
MaxAreaOption = Annotated[
    float | None, typer.Option(help="Only regions of at most so many pixels.", rich_help_panel=_SELECTION)
]
IdsOption = Annotated[
    Path | None, typer.Option(help="Only the ids in this file, one a line.", rich_help_panel=_SELECTION)
]
FirstOption = Annotated[int | None, typer.Option(min=1, help="Only the first N requests.", rich_help_panel=_SELECTION)]
ShardOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Only part I, from 0, of N; images stay whole.", rich_help_panel=_SELECTION),
]
QuestionOption = Annotated[
    str | None,
    typer.Option(
        help="What to ask about regions that come without a question; the region is <Prompt0>.",
        rich_help_panel=_PROMPT,
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="The system prompt.", rich_help_panel=_PROMPT)]
EachRegionOption = Annotated[
    bool,
    typer.Option(
        "--each-region",
        help="Describe every region by itself, whatever the input asks; its id is ID/0, ID/1, ...",
        rich_help_panel=_PROMPT,
    ),
]
GroupOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=5,
        help="Ask about up to so many regions of an image in the model's form for several regions: one mask, and "
        "the image is prefilled once for all. 1 is the authors' form for one region.",
        rich_help_panel=_PROMPT,
    ),
]
GroupGapOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Minimum gap between a group's regions, as a share of the image (0: they only must not overlap).",
        rich_help_panel=_PROMPT,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=2,
        help="Sampling temperature; 0 takes the most probable token each time.",
        rich_help_panel=_PROMPT,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes that read and prepare images for an engine (default: half of the cores, at most 8, "
        "with --ray one; 0: none).",
        rich_help_panel=_RUN,
    ),
]
InFlightOption = Annotated[int, typer.Option(min=1, help="Most requests in an engine at a time.", rich_help_panel=_RUN)]
MaxErrorsOption = Annotated[
    int | None, typer.Option(min=0, help="Stop after more error rows than this.", rich_help_panel=_RUN)
]
RestartsOption = Annotated[int, typer.Option(min=0, help="How often a dead engine is restarted.", rich_help_panel=_RUN)]
MixOption = Annotated[
    bool,
    typer.Option(
        "--mix",
        help="Go on with an output that another checkpoint, prompt or tiling began, or with an input that has other "
        "requests under ids that were answered.",
        rich_help_panel=_OUTPUT,
    ),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-errors",
        help="Ask again what the output has as errors: of the requests that --limit, --ids, --shard and the other "
        "filters let through, where there are any.",
        rich_help_panel=_OUTPUT,
    ),
]
CocoOption = Annotated[
    Path | None,
    typer.Option(
        help="When all is answered, write the input, which has to be COCO's JSON, here, with captions in it.",
        rich_help_panel=_OUTPUT,
    ),
]
ParquetOption = Annotated[
    Path | None,
    typer.Option(help="When all is answered, write the rows here as Parquet.", rich_help_panel=_OUTPUT),
]
MetricsOption = Annotated[
    Path | None, typer.Option(help="Write the numbers of the run here, as JSON.", rich_help_panel=_OUTPUT)
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Run on a Ray cluster (garserve\\[ray]): the one at ADDRESS, or that this machine is a node of, or, where "
        "there is none or with [bold]local[/], one that is started here. The output is a folder of parts with a "
        "manifest.",
        rich_help_panel=_RAY,
    ),
]
EnginesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Engines, each an actor that starts anew when it dies (default: one for each GPU, else for each node).",
        rich_help_panel=_RAY,
    ),
]
EngineCpusOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Cores of an engine (default: 1 beside a GPU, else half of a node's).",
        rich_help_panel=_RAY,
    ),
]
EngineGpusOption = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs of an engine (default: 1 where there are any).", rich_help_panel=_RAY),
]
