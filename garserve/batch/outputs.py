"""Other forms of a finished output: COCO's JSON with captions, and Parquet. Both are written whole or not at all."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from garserve.batch.journal import read_rows
from garserve.batch.record import id_text
from garserve.batch.source import Format, check_input
from garserve.batch.source_coco import annotation_id, items
from garserve.batch.source_parquet import parquet_module
from garserve.batch.sources import detect
from garserve.batch.temporary import temporary_space
from garserve.errors import GarserveError, RequestError

_ROWS = 1000  # of a row group
_NUMBERS = ("prompt_tokens", "cached_tokens", "answer_tokens", "asked")
_SECONDS = ("prepare_s", "engine_s")
_TEXTS = ("text", "error", "finish_reason", "form", "image", "category", "question", "place", "request")


def check_apart(**files: Path | None) -> None:
    """Check that no two files of a job are the same one, and that none would be read as part of the input.

    RequestError names the options. Folders are read whole, and what a job writes there would be input the next time.
    """
    source = files.get("input")
    found = _read_whole(source) if source is not None else ()
    known: dict[str, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if (first := known.setdefault(os.path.realpath(path), option)) != option:
            raise RequestError(f"{option} {path}: is the same file as {first}")
        if source is not None and path.suffix in found and _inside(path, source):
            raise RequestError(f"{option} {path}: the input is every {path.suffix} in this folder; choose another")


def _read_whole(source: Path) -> tuple[str, ...]:
    """Return the suffixes of files that would be read, or change how it is read, if they were put into an input."""
    if not source.is_dir():
        return ()
    try:
        annotated = detect(source) is Format.sa1b
    except RequestError:  # it is refused where it is opened
        annotated = False
    return (".tar", ".parquet", ".json") if annotated else (".tar", ".parquet")


def _inside(path: Path, folder: Path) -> bool:
    return os.path.realpath(path.parent) == os.path.realpath(folder)


def check_coco(source: Path, form: Format | None, target: Path, *, each_region: bool = False) -> None:
    """Check that an input can become COCO's JSON with captions, and that this can be written; RequestError if not."""
    if each_region:
        raise RequestError("--coco: an annotation has one caption; expected it without --each-region")
    check_input(source)
    found = form or detect(source)
    if found not in (Format.coco, Format.dlc_bench):
        raise RequestError(f"--coco: expected annotations in COCO's format as the input, got {found}")
    _check_target("--coco", target, source)


def check_parquet(source: Path, target: Path) -> None:
    """Check that Parquet can be written there; RequestError if not."""
    parquet_module()
    _check_target("--parquet", target, source)


def write_coco(source: Path, output: Path, target: Path) -> int:
    """Copy COCO's JSON, with a "caption" in each annotation that was answered; return how many were.

    Of the top level, "info", "licenses", "images", "annotations" and "categories" are kept.
    """
    captions = _Captions(source, output)

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            info = next(items(source, "info"), {})
            file.write('{"info": ' + json.dumps(info))
            for name in ("licenses", "images", "categories"):
                _write_array(file.write, name, items(source, f"{name}.item"))
            _write_array(file.write, "annotations", captions.annotations())
            file.write("}\n")

    try:
        _replace(target, write)
    finally:
        captions.close()
    return captions.count


class _Captions:
    """The texts of an output on disk, and the annotations of COCO's JSON that they belong to.

    Of annotations with one id only the first that was read was answered, and its row says which one that was.
    """

    def __init__(self, source: Path, output: Path) -> None:
        self.count = 0
        self._source = source
        self._table = sqlite3.connect("")  # SQLite's own temporary file
        try:
            self._fill(output)
        except BaseException:
            self.close()
            raise

    @temporary_space()
    def _fill(self, output: Path) -> None:
        columns = "id TEXT PRIMARY KEY, text TEXT, place TEXT, found INTEGER NOT NULL DEFAULT 0"
        self._table.execute(f"CREATE TABLE captions ({columns}) WITHOUT ROWID")
        rows = (
            (id_text(row["id"]), json.dumps(row["text"]), str(row.get("place")))
            for row in read_rows(output)
            if "text" in row
        )
        self._table.executemany("INSERT OR REPLACE INTO captions (id, text, place) VALUES (?, ?, ?)", rows)

    def annotations(self) -> Iterator[dict[str, Any]]:
        """Yield the annotations, those that were answered with their "caption"."""
        self._find()
        for key, place, one in self._keyed():
            text = self._take(key, place)
            self.count += text is not None
            yield one if text is None else {**one, "caption": text}

    @temporary_space()
    def _find(self) -> None:
        places = ((key, place) for key, place, _ in self._keyed())
        self._table.executemany("UPDATE captions SET found = 1 WHERE id = ? AND place = ?", places)

    def _keyed(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for number, one in enumerate(items(self._source, "annotations.item"), start=1):
            key = annotation_id(one)
            yield id_text(f"annotation-{number}" if key is None else key), f"annotation {number}", one

    @temporary_space()
    def _take(self, key: str, place: str) -> str | None:
        """Return an annotation's text, once; one that is found at no place any more goes to the first of its id."""
        which = "FROM captions WHERE id = ? AND (place = ? OR found = 0)"
        text = self._table.execute(f"SELECT text {which}", (key, place)).fetchone()
        if text is None:
            return None
        self._table.execute(f"DELETE {which}", (key, place))
        return str(json.loads(text[0]))

    def close(self) -> None:
        """Drop the table."""
        self._table.close()


def write_parquet(output: Path, target: Path) -> int:
    """Write an output's rows as Parquet, ids as texts, regions and groups as JSON; return how many there are."""
    parquet = parquet_module()
    import pyarrow as arrow

    names = ("id", *_TEXTS, *_NUMBERS, *_SECONDS, "group", "regions")
    kinds = {**dict.fromkeys(_NUMBERS, arrow.int64()), **dict.fromkeys(_SECONDS, arrow.float64())}
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in names])
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        with parquet.ParquetWriter(path, schema) as writer:
            remaining = read_rows(output)
            while rows := list(islice(remaining, _ROWS)):
                columns = {name: [_cell(row, name) for row in rows] for name in names}
                writer.write_table(arrow.table(columns, schema=schema))
                count += len(rows)

    _replace(target, write)
    return count


def _cell(row: dict[str, Any], name: str) -> Any:
    if name == "id":
        return str(row["id"]).encode("utf-8", "backslashreplace").decode()
    if name == "regions":
        return json.dumps(row.get("regions", []))
    value = row.get(name)
    if name == "group":
        return None if value is None else json.dumps(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _write_array(write: Callable[[str], Any], name: str, elements: Iterator[dict[str, Any]]) -> None:
    write(f', "{name}": [')
    for number, element in enumerate(elements):
        write((",\n" if number else "\n") + json.dumps(element))
    write("]")


def _check_target(option: str, target: Path, source: Path) -> None:
    if not target.parent.is_dir():
        raise RequestError(f"{option} {target}: no such folder: {target.parent}")
    if target.exists() and (not target.is_file() or (source.exists() and target.samefile(source))):
        raise RequestError(f"{option} {target}: is {'the input itself' if target.is_file() else 'no regular file'}")


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target, and put it there when it is whole."""
    beside = target.with_name(f".{target.name}.new")
    try:
        write(beside)
        beside.replace(target)
    except OSError as error:
        raise GarserveError(f"output {target}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)
