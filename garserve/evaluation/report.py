"""Results of an evaluation as a table, as JSON, and answer by answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from garserve.errors import InputError
from garserve.evaluation.run import Evaluation
from garserve.targets import unwritable


@dataclass(frozen=True)
class Conditions:
    """What a report is of: under other conditions, accuracies may be others."""

    checkpoint: str
    backend: str
    data: str  # the folder of the questions
    limit: int | None  # of questions; None asks all
    engine_options: Sequence[str]  # as they were given, NAME=VALUE
    runtime: str  # where the tower ran, and the dtypes
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    def __str__(self) -> str:
        asked = f"questions of {self.data}" + ("" if self.limit is None else f", --limit {self.limit}")
        options = "".join(f", --engine-option {one}" for one in self.engine_options)
        return f"{asked}{options}; {self.runtime}"


def show_report(console: Console, results: Mapping[str, Evaluation], conditions: Conditions) -> None:
    """Print the conditions, accuracies with their 95 % intervals by attribute and form, and each part's worth."""
    whole = results["whole"]
    described = {**conditions.machine, **conditions.versions}
    console.print(", ".join(f"{key} {value}" for key, value in described.items()), style="dim", markup=False)
    console.print(str(conditions), highlight=False, markup=False)
    table = Table(
        title=f"True answers in %, {escape(conditions.checkpoint)} on {conditions.backend}",
        caption="[95 % interval], then the number of judgements: a description counts once for each of its attributes",
    )
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


def json_report(results: Mapping[str, Evaluation], conditions: Conditions) -> dict[str, Any]:
    """Return everything that the tables show, and the conditions."""
    report: dict[str, Any] = {**asdict(conditions), **results["whole"].as_json()}
    without = {name: one.as_json() for name, one in results.items() if name != "whole"}
    return report | ({"without": without} if without else {})


def check_target(path: Path) -> None:
    """Check that a file can be written; InputError where not."""
    if wrong := unwritable(path):
        raise InputError(f"{path}: {wrong}")


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
