"""`garserve eval`: how often a checkpoint tells the truth (floor 8)."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from garserve.checkpoint import TINY
from garserve.cli_options import (
    Backend,
    CheckpointOption,
    EngineOption,
    JsonOption,
    LimitOption,
    TileCacheOption,
    VerboseOption,
    VisionBackendOption,
    VisionModelOption,
)
from garserve.cli_shared import console, open_engine, status_console
from garserve.errors import RequestError
from garserve.evaluation.part import Part

evaluations = typer.Typer(no_args_is_help=True)
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@evaluations.callback()
def root() -> None:
    """Measure how often a checkpoint tells the truth."""


@evaluations.command()
def tiny(
    data: Annotated[
        Path | None,
        typer.Argument(help="Folder with questions.jsonl and the images that it names (default: those of garserve)."),
    ] = None,
    checkpoint: CheckpointOption = TINY,
    limit: LimitOption = None,
    ablation: Annotated[
        list[Part] | None, typer.Option(help="Also without this part (reference backend only); may be repeated.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Write every question and answer here, one JSON object a line.")
    ] = None,
    backend: Backend = "vllm",
    vision_backend: VisionBackendOption = None,
    vision_model: VisionModelOption = None,
    tile_cache_gb: TileCacheOption = None,
    engine_option: EngineOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Ask questions with known answers about held-out scenes and photographs, and print how many are answered truly.

    The true answers are in the words that the tiny checkpoint was taught; other checkpoints answer in their own.
    """
    from garserve.bench.machine import machine, versions
    from garserve.bench.runtime import runtime
    from garserve.evaluation.questions import PACKAGED, read_questions
    from garserve.evaluation.report import Conditions, check_target, json_report, show_report, write_answers
    from garserve.evaluation.run import run_evaluations

    parts = list(dict.fromkeys(ablation or []))
    if parts and backend != "reference":
        raise RequestError(f"--ablation: expected --backend reference, got {backend}")
    if answers is not None:
        check_target(answers)
    folder = data or PACKAGED
    questions = read_questions(folder, limit)
    if Part.mask in parts and vision_backend is None and vision_model is None:
        vision_backend = "torch"  # of an exported tower, the mask embedding cannot be taken out
    choices = {"tile_cache_gb": tile_cache_gb, "vision_backend": vision_backend, "vision_model": vision_model}
    with (
        open_engine(checkpoint, backend, engine_option, verbose, **choices) as engine,
        Progress(*_COLUMNS, console=status_console) as progress,
    ):
        ran = str(runtime(engine))
        task = progress.add_task("questions", total=len(questions) * (1 + len(parts)))
        results = run_evaluations(engine, questions, parts, on_answer=lambda: progress.advance(task))
    options = engine_option or []
    conditions = Conditions(checkpoint, backend, str(folder), limit, options, ran, machine(), versions())
    if as_json:
        typer.echo(json.dumps(json_report(results, conditions), indent=2))
    else:
        show_report(console, results, conditions)
    if answers is not None:
        write_answers(answers, results["whole"])
