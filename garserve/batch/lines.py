"""Files with one JSON object a line, and the one loop that makes records of them."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from garserve.batch.record import Id, Record
from garserve.batch.request_line import refusal
from garserve.batch.source import Reading, check_input
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
    """Count the lines that are not blank; RequestError where the file is a pipe, which counting would use up."""
    check_input(path)
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def identity(data: Any, field: str) -> Id | None:
    """Return an id that can be one: a text or a whole number."""
    value = data.get(field) if isinstance(data, dict) else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def record_or_error(read: Callable[[], Record], place: str, key: Id | None) -> Record:
    """Return what `read` returns, or a record with what is wrong where it raises what data from outside can cause."""
    try:
        return read()
    except ValidationError as error:
        return Record(place, key, error=str(refusal(error)))
    except InputError as error:
        return Record(place, key, error=str(error))
    except (TypeError, LookupError, ArithmeticError, ValueError, RecursionError) as error:  # no field takes such values
        return Record(place, key, error=f"cannot be used ({type(error).__name__}: {error})")


class LineSource:
    """One request a line; `id_field` is where its id is, `read` what makes a record of it."""

    id_field = "id"

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self._folder = reading.images or path.parent
        self.total = None if reading.each_region else count_lines(path)

    def records(self) -> Iterator[Record]:
        """Yield a record for every line that is not blank."""
        for place, data, error in json_lines(self.path):
            if error is None:
                yield record_or_error(partial(self.read, data, place), place, identity(data, self.id_field))
            else:
                yield Record(place, error=error)

    def read(self, data: Any, place: str) -> Record:
        """Return decoded JSON as a record; InputError or pydantic's ValidationError where it cannot be one."""
        raise NotImplementedError
