"""Parquet: a file or a folder of them, with the columns of a requests file (garserve[parquet]).

`image` is a path, the bytes of a file, or Hugging Face's {"bytes", "path"}; `regions` are lists or JSON.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from garserve.batch.lines import identity, record_or_error
from garserve.batch.record import Record
from garserve.batch.request_line import read_line
from garserve.batch.source import Reading
from garserve.batch.source_jsonl import category
from garserve.errors import RequestError

_ROWS = 64  # read at a time
_WHOLE = ("id", "max_tokens", "seed", "prompt_index")  # as pandas has them where some are missing: as floats, with NaN
_EXACT = 2**53  # below it every whole number has a float of its own


class ParquetSource:
    """One record a row, file by file in the order of their names."""

    def __init__(self, path: Path, reading: Reading) -> None:
        """Count the rows; RequestError where no file can be read."""
        self.path = path
        self._parquet = parquet_module()
        self._paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self._paths:
            raise RequestError(f"input {path}: expected *.parquet files in the folder, got none")
        self._folder = reading.images or self._paths[0].parent
        rows = self._count()
        self.total = None if reading.each_region else rows

    def _count(self) -> int:
        rows, broken = 0, []
        for path in self._paths:
            try:
                rows += self._opened(path).metadata.num_rows
            except RequestError as error:
                broken.append(error)
        if len(broken) == len(self._paths):
            raise broken[0]
        return rows + len(broken)

    def _opened(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except Exception as error:  # pyarrow's own, and Python's
            raise RequestError(f"input {path}: not Parquet, or broken ({error})") from None

    def records(self) -> Iterator[Record]:
        """Yield every row; of a file that cannot be read, or not to its end, one error more."""
        for path in self._paths:
            number = 0
            try:
                for batch in self._opened(path).iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        yield self._record(row, f"{path.stem} row {number}", f"{os.path.abspath(path)}::{number}")
                        number += 1
            except RequestError as error:
                yield Record(path.name, error=str(error))
            except Exception as error:  # pyarrow's own, and Python's
                yield Record(path.name, error=f"input {path}: broken after {number} rows ({error})")

    def _record(self, row: dict[str, Any], place: str, name: str) -> Record:
        for field in _WHOLE:
            row[field] = _whole(row.get(field))
        return record_or_error(partial(self._read, row, place, name), place, identity(row, "id"))

    def _read(self, row: dict[str, Any], place: str, name: str) -> Record:
        data = {key: value for key, value in row.items() if value is not None}
        image = data.get("image")
        content = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(image, dict) and content is None:
            data["image"] = image.get("path")
        if isinstance(content, bytes):
            data["image"] = name  # stands in for the bytes while the row is checked
        data["regions"] = _regions(data.get("regions", []))
        record = read_line(data).record(self._folder, place, category(data))
        return replace(record, image=content, image_name=name) if isinstance(content, bytes) else record


def parquet_module() -> Any:
    """Import pyarrow's Parquet; RequestError says how to install it."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError("Parquet needs pyarrow: pip install 'garserve[parquet]'") from None
    return parquet


def _whole(value: Any) -> Any:
    """Return a float that is a whole number as that, NaN as None, and anything else as it is."""
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _regions(value: Any) -> Any:
    """Return a cell's regions as a list, and what is none as it is, for the line's check to refuse."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"regions: not JSON ({error})") from None
    return _plain(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Columns of structs have every field in every row; RLE counts may be bytes, and coordinates decimals."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Decimal):
        return float(value)
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value
