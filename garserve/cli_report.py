"""`garserve report` (floor 8)."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from garserve.cli_shared import console
from garserve.errors import RequestError


def report(
    output: Annotated[Path, typer.Argument(help="The output of a batch: JSON lines, or a folder of parts.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="The page, or with --sample the PNG, to write.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows that the page shows (default: 10000).")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, max=200, help="Instead of the page, a contact sheet of so many random rows.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which rows --sample takes (default: 0).")] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the pictures, if they were moved.")
    ] = None,
) -> None:
    """Show an output as one page: pictures, coloured regions, answers, errors, a filter. It needs no other file.

    Links may say what is shown: report.html#filter=red&kind=errors&page=2.
    """
    from garserve.batch.contact_sheet import write_contact_sheet
    from garserve.batch.report import write_report

    if sample is not None and limit is not None:
        raise RequestError(f"--limit: expected it without --sample, which takes of all rows, got {limit}")
    if sample is None and seed is not None:
        raise RequestError(f"--seed: expected it with --sample, whose rows it chooses, got {seed}")
    if not target.parent.is_dir():
        raise RequestError(f"--output {target}: no such folder: {target.parent}")
    if target.exists() and output.exists() and target.samefile(output):
        raise RequestError(f"--output {target}: is the input itself")
    if sample is None:
        shown = write_report(output, target, limit=limit or 10_000, folder=images)
    else:
        shown = write_contact_sheet(output, target, sample, seed=seed or 0, folder=images)
    console.print(f"{shown.rows} rows: {escape(str(target))}", soft_wrap=True)
    if shown.missing:
        where = "; --images FOLDER says where they are now" if images is None else f" in {images}"
        console.print(f"{shown.missing} pictures not found{escape(where)}", soft_wrap=True)
