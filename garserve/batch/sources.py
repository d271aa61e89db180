"""Opening an input in whatever format it has: told, or seen from the input itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import ijson

from garserve.batch.record import Record
from garserve.batch.request_line import RequestLine as RequestLine
from garserve.batch.source import Format, Reading, Source
from garserve.batch.source_bench import GarBenchSource
from garserve.batch.source_coco import CocoSource
from garserve.batch.source_folder import SUFFIXES, FolderSource
from garserve.batch.source_jsonl import JsonlSource
from garserve.batch.source_openai import OpenAISource
from garserve.batch.source_parquet import ParquetSource
from garserve.batch.source_sa1b import Sa1bSource
from garserve.batch.source_webdataset import WebDatasetSource
from garserve.errors import RequestError

_SOURCES: dict[Format, Callable[[Path, Reading], Source]] = {
    Format.jsonl: JsonlSource,
    Format.openai: OpenAISource,
    Format.coco: CocoSource,
    Format.dlc_bench: CocoSource,  # the same form
    Format.sa1b: Sa1bSource,
    Format.gar_bench: GarBenchSource,
    Format.folder: FolderSource,
    Format.parquet: ParquetSource,
    Format.webdataset: WebDatasetSource,
}
_FOLDERS = frozenset({Format.folder, Format.sa1b, Format.parquet, Format.webdataset})
_LINES_LOOKED_AT = 20


def open_source(path: Path, form: Format | None = None, reading: Reading | None = None) -> Source:
    """Return a source for an input.

    Raises RequestError where there is no such input, where it is empty, or where its format is not known.
    """
    if not path.exists():
        raise RequestError(f"input {path}: no such file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise RequestError(f"input {path}: empty (0 bytes)")
    chosen = form or detect(path)
    if path.is_dir() and chosen not in _FOLDERS:
        raise RequestError(f"input {path}: expected a file for the format {chosen}, got a folder")
    if path.is_file() and chosen is Format.folder:
        raise RequestError(f"input {path}: expected a folder for the format folder, got a file")
    return _SOURCES[chosen](path, reading or Reading())


def detect(path: Path) -> Format:
    """Say which format an input has; RequestError where none fits."""
    found = _detect_folder(path) if path.is_dir() else _detect_file(path)
    if found is None:
        known = ", ".join(Format)
        raise RequestError(f"input {path}: unknown format; expected one of {known} (--format says which)")
    return found


def _detect_folder(path: Path) -> Format | None:
    if any(path.glob("*.tar")):
        return Format.webdataset
    if any(path.glob("*.parquet")):
        return Format.parquet
    if (first := next(path.glob("*.json"), None)) is not None and _detect_json(first) is Format.sa1b:
        return Format.sa1b
    inner = path / "images"
    folder = inner if inner.is_dir() else path
    return Format.folder if any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()) else None


def _detect_file(path: Path) -> Format | None:
    by_suffix = {".parquet": Format.parquet, ".tar": Format.webdataset}
    if (found := by_suffix.get(path.suffix.lower())) is not None:
        return found
    lines = _detect_lines(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return lines or Format.jsonl
    return lines or _detect_json(path)


def _detect_lines(path: Path) -> Format | None:
    """Look for a line that is an object with the fields of a request, among the first ones."""
    with path.open("rb") as file:
        for raw in islice(iter(lambda: file.readline(1 << 20), b""), _LINES_LOOKED_AT):
            try:
                data = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(data, dict) and "custom_id" in data and "body" in data:
                return Format.openai
            if isinstance(data, dict) and isinstance(data.get("image"), str) and "regions" in data:
                return Format.jsonl
    return None


def _detect_json(path: Path) -> Format | None:
    """Read a JSON file up to the first key that tells."""
    try:
        with path.open("rb") as file:
            for prefix, event, value in ijson.parse(file):
                if (prefix, event) == ("", "start_array"):
                    return Format.gar_bench
                if prefix == "" and event == "map_key" and value == "image":
                    return Format.sa1b
                if prefix == "" and event == "map_key" and value in ("images", "categories"):
                    return Format.coco
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    return None


def each_region(records: Iterator[Record]) -> Iterator[Record]:
    """Ask for the description of every region by itself; region i of a record R becomes R/i."""
    kept = ("system", "max_tokens", "temperature", "seed")
    for record in records:
        if record.error is not None or len(record.regions) == 0:
            yield record
            continue
        options = {name: value for name, value in record.options.items() if name in kept}
        for number, region in enumerate(record.regions):
            yield replace(
                record,
                place=f"{record.place} region {number}",
                id=f"{record.key}/{number}",
                regions=(region,),
                options=options,
            )
