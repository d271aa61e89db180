"""Which error rows of an output are asked again: those of the input at hand, not what another one left there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from garserve.batch.filters import Filters
from garserve.batch.ledger import Ledger
from garserve.batch.record import Id, Member, Record
from garserve.batch.selection import Selection
from garserve.batch.source import Source
from garserve.batch.source_webdataset import BESIDE

_PART = re.compile(r" (?:annotation|value) ")  # of a picture: what stands behind it


class _Noting:
    """A source that notes every id that an error row of its records may have, now or before they were repaired."""

    path: Path
    total: int | None

    def __init__(self, source: Source, ledger: Ledger) -> None:
        self._source, self._ledger = source, ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def records(self) -> Iterator[Record]:
        files = self.path.iterdir() if self.path.is_dir() else (self.path,)
        for file in files:  # one that was broken is an error row itself
            self._ledger.note({"id": Record(file.name).key})
        for record in self._source.records():
            for known in _ids(record):
                self._ledger.note({"id": known})
            yield record


def _ids(record: Record) -> set[Id]:
    """Return a record's id, and those that it, or the picture that it is a part of, had while it could not be read."""
    found = {record.key, record.place, replace(record, id=None).key}
    whole, *parts = _PART.split(record.place)
    if isinstance(record.image, Member):
        found.add(f"{PurePath(record.image.path).stem}/{record.image.name}")  # where files stood apart
        found |= {f"{whole}{suffix}" for suffix in BESIDE}
    return found | ({whole, PurePath(whole).stem} if parts else set())


def note_asked(selection: Selection, ledger: Ledger) -> None:
    """Read an input, and note the ids whose error rows a job drops since it asks them again, or need not any more.

    With filters these are the ids that they let through; without, also the places of lines and the names of files
    that could not be read before and now have records with other ids. RequestError where the input cannot be read.
    """
    whole = selection.filters == Filters()
    chosen = replace(selection, source=_Noting(selection.source, ledger)) if whole else selection
    read = Ledger()
    try:
        for bundle in chosen.bundles(read):
            for record in bundle.records:
                ledger.note({"id": record.key})
    finally:
        read.close()
