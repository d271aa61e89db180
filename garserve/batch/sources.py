"""Opening an input in whatever format it has: told, or seen from the input itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from garserve.batch.record import Record
from garserve.batch.request_line import RequestLine as RequestLine
from garserve.batch.source import Format, Reading, Source, check_input
from garserve.batch.source_bench import GarBenchSource
from garserve.batch.source_coco import CocoSource, skip_mark
from garserve.batch.source_folder import SUFFIXES, FolderSource
from garserve.batch.source_jsonl import JsonlSource
from garserve.batch.source_openai import OpenAISource
from garserve.batch.source_parquet import ParquetSource
from garserve.batch.source_sa1b import Sa1bSource, annotation_files
from garserve.batch.source_webdataset import WebDatasetSource
from garserve.errors import RequestError
from garserve.inputs.encoded import SUFFIX

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
_LOOKED_AT = 20  # lines of a file, or JSON files of a folder
_LINE_BYTES = 1 << 20  # of a line that is read whole to see what it is


def open_source(path: Path, form: Format | None = None, reading: Reading | None = None) -> Source:
    """Return a source for an input.

    Raises RequestError where there is no such input or it cannot be read, where it is empty, where its format is not
    known, or where a folder of images or masks is missing.
    """
    reading = reading or Reading()
    check_input(path)
    for option, folder in {"--images": reading.images, "--masks": reading.masks}.items():
        if folder is not None and not folder.is_dir():
            raise RequestError(f"{option} {folder}: no such folder")
    if path.is_file() and path.stat().st_size == 0:
        raise RequestError(f"input {path}: empty (0 bytes)")
    chosen = form or detect(path)
    if path.is_dir() and chosen not in _FOLDERS:
        raise RequestError(f"input {path}: expected a file for the format {chosen}, got a folder")
    if path.is_file() and chosen is Format.folder:
        raise RequestError(f"input {path}: expected a folder for the format folder, got a file")
    return _SOURCES[chosen](path, reading)


def detect(path: Path) -> Format:
    """Say which format an input has; RequestError where none fits, or where it cannot be read."""
    check_input(path)
    try:
        found = _detect_folder(path) if path.is_dir() else _detect_file(path)
    except OSError as error:
        raise RequestError(f"input {path}: cannot be read ({error.strerror or error})") from None
    if found is None:
        known = ", ".join(Format)
        raise RequestError(f"input {path}: unknown format; expected one of {known} (--format says which)")
    return found


def _detect_folder(path: Path) -> Format | None:
    if any(path.glob("*.tar")):
        return Format.webdataset
    if any(path.glob("*.parquet")):
        return Format.parquet
    if any(_detect_json(one) is Format.sa1b for one in islice(annotation_files(path), _LOOKED_AT)):
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
        return Format.openai if lines is Format.openai else Format.jsonl
    return lines or _detect_json(path)


def _detect_lines(path: Path) -> Format | None:
    """Look for a line that is an object with the fields of a request, among the first ones.

    Of a line that is too long to be held, as a data URL or a whole file in one line makes it, the keys are looked at.
    """
    with path.open("rb") as file:
        for _ in range(_LOOKED_AT):
            start = file.tell()
            raw = file.readline(_LINE_BYTES)
            if not raw:
                break
            whole = len(raw) < _LINE_BYTES or raw.endswith(b"\n")
            if whole:
                found = _line_format(raw)
            else:
                file.seek(start)
                found = _format_by_keys(file)
            if found is not None:
                return found
            if not whole:
                file.seek(start)
                _pass_line(file)
    return None


def _pass_line(file: BinaryIO) -> None:
    while (piece := file.readline(_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass


def _line_format(raw: bytes) -> Format | None:
    try:
        data: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if isinstance(data, dict) and "custom_id" in data and "body" in data:
        return Format.openai
    if isinstance(data, dict) and isinstance(data.get("image"), str) and "regions" in data:
        return Format.jsonl
    return None


def _detect_json(path: Path) -> Format | None:
    """Say what a JSON file is whose lines are no requests."""
    try:
        with path.open("rb") as file:
            found = _format_by_keys(file)
    except OSError:
        return None
    return found if found in (Format.coco, Format.sa1b, Format.gar_bench) else None


def _format_by_keys(file: BinaryIO) -> Format | None:
    """Read the JSON that begins here up to the top-level key that tells; None where none does or it is no JSON."""
    skip_mark(file)
    keys: set[str] = set()
    image = ""  # what its value begins with
    try:
        for prefix, event, value in ijson.parse(file, multiple_values=True):
            if prefix == "image":
                image = image or event
            elif (prefix, event) == ("", "map_key"):
                keys.add(value)
            elif (prefix, event) == ("", "start_array"):
                return Format.gar_bench
            elif (prefix, event) == ("", "end_map"):
                return None
            else:
                continue
            if (found := _keys_tell(keys, image)) is not None:
                return found
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    return None


def _keys_tell(keys: set[str], image: str) -> Format | None:
    if {"custom_id", "body"} <= keys:
        return Format.openai
    if image == "string" and "regions" in keys:
        return Format.jsonl
    if image == "start_map":
        return Format.sa1b
    return Format.coco if keys & {"images", "categories"} else None


def each_region(records: Iterator[Record]) -> Iterator[Record]:
    """Ask for the description of every region by itself; region i of a record R becomes R/i.

    Of an encoded image, whose regions are only seen where it is read, one with several is refused there.
    """
    kept = ("system", "max_tokens", "temperature", "seed")
    for record in records:
        options = {name: value for name, value in record.options.items() if name in kept}
        if record.error is None and _is_encoded(record) and options != record.options:
            yield replace(record, id=f"{record.key}/0", options=options)
            continue
        if record.error is not None or len(record.regions) == 0:
            yield record
            continue
        for number, region in enumerate(record.regions):
            yield replace(
                record,
                place=f"{record.place} region {number}",
                id=f"{record.key}/{number}",
                regions=(region,),
                options=options,
            )


def _is_encoded(record: Record) -> bool:
    return isinstance(record.image, str) and record.image.endswith(SUFFIX) and len(record.regions) == 0
