"""Parquet: a file or a folder of them, with the columns of a requests file (garserve[parquet]).

`image` is a path, the bytes of a file, or Hugging Face's {"bytes", "path"}; `regions` are lists or JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from garserve.batch.record import Record
from garserve.batch.source import Reading
from garserve.batch.source_jsonl import line_record
from garserve.errors import RequestError

_ROWS = 64  # read at a time


class ParquetSource:
    """One record a row, file by file in the order of their names."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self._parquet = parquet_module()
        self._paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self._folder = reading.images or self._paths[0].parent
        try:
            rows = sum(self._parquet.ParquetFile(one).metadata.num_rows for one in self._paths)
        except (OSError, ValueError) as error:
            raise RequestError(f"input {path}: not Parquet ({error})") from None
        self.total = None if reading.each_region else rows

    def records(self) -> Iterator[Record]:
        """Yield every row."""
        for path in self._paths:
            number = 0
            for batch in self._parquet.ParquetFile(path).iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield self._record(row, f"{path.stem} row {number}", f"{path.absolute()}::{number}")
                    number += 1

    def _record(self, row: dict[str, Any], place: str, name: str) -> Record:
        data = {key: value for key, value in row.items() if value is not None}
        image = data.get("image")
        content = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(image, dict) and content is None:
            data["image"] = image.get("path")
        if isinstance(content, bytes):
            data["image"] = name  # stands in for the bytes while the row is checked
        if isinstance(data.get("regions"), str):
            try:
                data["regions"] = json.loads(data["regions"])
            except ValueError as error:
                return Record(place, data.get("id"), error=f"regions: not JSON ({error})")
        data["regions"] = [_without_none(region) for region in data.get("regions") or []]
        record = line_record(data, place, self._folder)
        return replace(record, image=content, image_name=name) if isinstance(content, bytes) else record


def parquet_module() -> Any:
    """Import pyarrow's Parquet; RequestError says how to install it."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError("Parquet needs pyarrow: pip install 'garserve[parquet]'") from None
    return parquet


def _without_none(value: Any) -> Any:
    """Columns of structs have every field in every row; RLE counts may be bytes."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value
