"""garserve's own JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from garserve.batch.record import Id, Record
from garserve.batch.request_line import read_line
from garserve.batch.source import Reading
from garserve.errors import InputError


def json_lines(path: Path) -> Iterator[tuple[str, Any, str | None]]:
    """Yield (place, decoded JSON, None) for every line that is not blank, or (place, None, what is wrong)."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield f"line {number}", json.loads(raw), None
            except (ValueError, RecursionError) as error:  # syntax, UTF-8, numbers of thousands of digits
                yield f"line {number}", None, f"not JSON ({error})"


def count_lines(path: Path) -> int:
    """Count the lines that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def identity(data: Any, field: str) -> Id | None:
    """Return an id that can be one: a text or a whole number."""
    value = data.get(field) if isinstance(data, dict) else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


class JsonlSource:
    """One request a line: {"image", "regions", "question", "id", ...}."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self._folder = reading.images or path.parent
        self.total = None if reading.each_region else count_lines(path)

    def records(self) -> Iterator[Record]:
        """Yield a record for every line that is not blank."""
        for place, data, error in json_lines(self.path):
            yield line_record(data, place, self._folder) if error is None else Record(place, error=error)


def line_record(data: Any, place: str, folder: Path) -> Record:
    """Return decoded JSON as a record, with its error where it cannot be used."""
    try:
        return read_line(data).record(folder, place, category(data))
    except InputError as error:
        return Record(place, identity(data, "id"), error=str(error))
    except (TypeError, LookupError, ArithmeticError, ValueError) as error:  # values of a kind that no field takes
        return Record(place, identity(data, "id"), error=f"cannot be used ({type(error).__name__}: {error})")


def category(data: Any) -> str | None:
    """Return what a line says about its kind, where it does: "category", or GAR-Bench's "type"."""
    found = data.get("category", data.get("type")) if isinstance(data, dict) else None
    return None if found is None else str(found)
