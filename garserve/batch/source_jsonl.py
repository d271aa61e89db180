"""garserve's own JSON lines."""

from pathlib import Path
from typing import Any

from garserve.batch.lines import LineSource, identity, record_or_error
from garserve.batch.record import Record
from garserve.batch.request_line import read_line


class JsonlSource(LineSource):
    """One request a line: {"image", "regions", "question", "id", ...}."""

    def read(self, data: Any, place: str) -> Record:
        """Return a line as a record; RequestError where it cannot be one."""
        return read_line(data).record(self._folder, place, category(data))


def line_record(data: Any, place: str, folder: Path) -> Record:
    """Return decoded JSON from elsewhere as a record, with its error where it cannot be used."""
    return record_or_error(lambda: read_line(data).record(folder, place, category(data)), place, identity(data, "id"))


def category(data: Any) -> str | None:
    """Return what a line says about its kind, where it does: "category", or GAR-Bench's "type"."""
    found = data.get("category", data.get("type")) if isinstance(data, dict) else None
    return None if found is None else str(found)
