"""Results of an evaluation as a table, as JSON, and answer by answer."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from garserve.errors import InputError
from garserve.evaluation.run import Evaluation


def show_report(console: Console, results: Mapping[str, Evaluation], title: str) -> None:
    """Print accuracies with their 95 % intervals, by attribute and form, and then what each part left out was worth."""
    whole = results["whole"]
    table = Table(title=f"True answers in %, {escape(title)}", caption="[95 % interval], then the number of questions")
    table.add_column("attribute")
    table.add_column("form")
    for split in whole.splits:
        table.add_column(escape(split), justify="right")
    for attribute, form in whole.kinds():
        cells = [escape(str(whole.accuracy(split, attribute, form))) for split in whole.splits]
        table.add_row(escape(attribute), form, *cells)
    table.add_section()
    table.add_row("all", "", *(escape(str(whole.accuracy(split))) for split in whole.splits))
    console.print(table)
    if len(results) > 1:
        console.print(_parts(results))


def _parts(results: Mapping[str, Evaluation]) -> Table:
    """One row an attribute, one column for the whole model and for each part left out."""
    table = Table(title="The same model without one of its parts")
    table.add_column("attribute")
    for name in results:
        table.add_column(name if name == "whole" else f"without {name}", justify="right")
    for attribute in dict.fromkeys(attribute for attribute, _ in results["whole"].kinds()):
        cells = [escape(str(one.accuracy(attribute=attribute))) for one in results.values()]
        table.add_row(escape(attribute), *cells)
    table.add_section()
    table.add_row("all", *(escape(str(one.accuracy())) for one in results.values()))
    return table


def json_report(results: Mapping[str, Evaluation], checkpoint: str, backend: str) -> dict[str, Any]:
    """Return everything that the tables show."""
    report: dict[str, Any] = {"checkpoint": checkpoint, "backend": backend, **results["whole"].as_json()}
    without = {name: one.as_json() for name, one in results.items() if name != "whole"}
    return report | ({"without": without} if without else {})


def check_target(path: Path) -> None:
    """Check that a file can be written; InputError where not."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: expected a folder that can be written to")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise InputError(f"{path}: expected a file that can be written")


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write one JSON object a question: id, question, answer, what a true answer says, and whether this one does."""
    rows = [
        {
            "id": one.question.request.id,
            "question": one.question.request.question,
            "answer": one.text,
            "true_answer": one.question.answer,
            "truth": one.question.truth,
            "right": one.right,
        }
        for one in evaluation.judged
    ]
    try:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
