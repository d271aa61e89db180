"""A measurement as it is printed and saved: conditions, the machine, and one tidy row a figure."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from garserve.bench.machine import machine, versions
from garserve.cli_options import printable

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a verb of `garserve bench` found."""

    name: str
    conditions: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "conditions": self.conditions,
            "machine": machine(),
            "versions": versions(),
            "figures": [{key: _short(value) for key, value in row.items()} for row in self.rows],
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write it as a file of JSON."""
        path.write_text(json.dumps(self.document(), indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print a table with the machine and the conditions above it, texts as they are: they may be a server's."""
        described = {**machine(), **versions()}
        console.print(_plain(", ".join(f"{key} {value}" for key, value in described.items())), style="dim")
        console.print(_plain(self.conditions))
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        if len(self.rows) == 1:
            table = Table("figure", "value")
            for column in columns:
                table.add_row(_plain(column), _plain(_text(self.rows[0][column])))
        else:
            table = Table(*columns)
            for row in self.rows:
                table.add_row(*(_plain(_text(row.get(column, ""))) for column in columns))
        console.print(table)
        for note in self.notes:
            console.print(_plain(note))


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _plain(text: str) -> Text:
    """Return a text in which rich finds no markup, and which tells a terminal nothing."""
    return Text(printable(text))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
