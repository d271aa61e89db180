"""COCO's and LVIS's instances, and DLC-Bench, which has the same form: one record an annotation.

The file may be larger than memory. It is parsed as a stream into a temporary table on disk, because annotations come
in any order and those of one image belong together.
"""

import codecs
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ijson

from garserve.batch.record import Id, Record
from garserve.batch.source import Reading, check_local, located
from garserve.batch.temporary import temporary_space
from garserve.errors import InputError, RequestError

_TABLES = """
CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT, spare TEXT, size TEXT, shared INTEGER NOT NULL DEFAULT 0);
CREATE TABLE annotations (number INTEGER PRIMARY KEY, image TEXT, data TEXT);
"""
_ADD_IMAGE = """
INSERT INTO images (id, name, spare, size) VALUES (?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET shared = 1 WHERE name IS NOT excluded.name
"""
_ANNOTATIONS = """
SELECT annotations.number, annotations.data, images.name, images.spare, images.size, images.shared
FROM annotations LEFT JOIN images ON images.id = annotations.image ORDER BY images.rowid, annotations.number
"""

_NO_NUMBERS = (b"NaN", b"Infinity", b"-Infinity")


class _Image(NamedTuple):
    """What an annotation's image is called, and where it lies."""

    name: str
    path: str


class CocoSource:
    """Annotations by image, images in the file's order."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        self.categories: frozenset[str] | None = None
        self._folders = image_folders(path, reading)

    def records(self) -> Iterator[Record]:
        """Yield every annotation; RequestError where the file is not COCO's JSON, SpaceError where no table fits."""
        table = sqlite3.connect("")  # SQLite's own temporary file; it is gone with the connection
        try:
            with temporary_space():
                yield from self._annotations(table)
        finally:
            table.close()

    def _annotations(self, table: sqlite3.Connection) -> Iterator[Record]:
        categories = self._fill(table)
        (self.total,) = table.execute("SELECT count(*) FROM annotations").fetchone()
        image = _Image("", "")
        for number, data, name, spare, size, shared in table.execute(_ANNOTATIONS):
            place, annotation = f"annotation {number}", json.loads(data)
            if shared or not name:
                known = f"{annotation.get('image_id')!r:.80}"
                wrong = f"two images have the id {known}" if shared else f"no image {known} in {self.path.name}"
                yield Record(place, annotation_id(annotation), error=f"image_id: {wrong}")
                continue
            if name != image.name:  # annotations come image by image
                image = _Image(name, self._located(name, spare))
            record = _record(place, image, annotation, categories)
            yield record if size is None else replace(record, size=tuple(json.loads(size)))

    def _located(self, name: str, spare: str | None) -> str:
        path = located(name, self._folders)
        if spare is None or os.path.isfile(path):
            return path
        flat = located(spare, self._folders)
        return flat if os.path.isfile(flat) else path

    def _fill(self, table: sqlite3.Connection) -> dict[str, str]:
        table.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        table.executemany(_ADD_IMAGE, map(_image_row, items(self.path, "images.item")))
        used: set[str] = set()  # ids of categories

        def annotations() -> Iterator[tuple[int, str, str]]:
            for number, one in enumerate(items(self.path, "annotations.item"), start=1):
                used.add(_key(one.get("category_id")))
                yield number, _key(one.get("image_id")), json.dumps(one)

        table.executemany("INSERT INTO annotations VALUES (?, ?, ?)", annotations())
        table.execute("CREATE INDEX by_image ON annotations (image, number)")
        names = {_key(one.get("id")): str(one.get("name")) for one in items(self.path, "categories.item")}
        self.categories = frozenset(names.values()) | {str(json.loads(one)) for one in used - names.keys() - {"null"}}
        return names


def _record(place: str, image: _Image, data: dict[str, Any], categories: Mapping[str, str]) -> Record:
    try:
        check_local("file_name", image.name)
        region = annotation_region(data)
    except InputError as error:
        return Record(place, annotation_id(data), image_name=image.path, error=str(error), stated_image=image.name)
    known = _key(data.get("category_id"))
    return Record(
        place=place,
        id=annotation_id(data),
        image=image.path,
        image_name=image.path,
        regions=(region,),
        category=categories.get(known, None if known == "null" else str(json.loads(known))),
        area=stated_area(data),
        stated_image=image.name,
    )


def items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array one by one; RequestError where the file is not JSON."""
    try:
        with path.open("rb") as file:
            skip_mark(file)
            for one in ijson.items(file, prefix, use_float=True):
                yield one if isinstance(one, dict) else {}
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise RequestError(f"input {path}: {_refused(str(error))}") from None


def _refused(complaint: str) -> str:
    """Return what yajl complains of; in words of its own where it is a number that other parsers take."""
    _, near, mark, *_ = [*complaint.splitlines(), "", "", ""]
    where = f"near {near.strip()!r:.80}"
    if "integer overflow" in complaint:
        return f"a whole number has more than 63 bits, {where}; write such ids as texts"
    if near.encode()[mark.find("^") - 1 :].startswith(_NO_NUMBERS):  # the mark counts bytes
        return f"NaN and Infinity are no JSON, {where}; write null instead"
    return f"not JSON ({' '.join(complaint.split())[:120]})"


def skip_mark(file: BinaryIO) -> None:
    """Pass a byte order mark, which yajl takes for a syntax error, where one comes next."""
    start = file.tell()
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(start)


def annotation_region(data: dict[str, Any]) -> dict[str, Any]:
    """Return an annotation's region as Region.parse takes it: polygons, RLE, or else the box."""
    shape = data.get("segmentation")
    if isinstance(shape, dict):
        return {"rle": shape}
    if isinstance(shape, list) and any(shape):
        rings = [ring for ring in shape if isinstance(ring, list) and len(ring) >= 6]
        return {"polygon": rings or shape}  # data sets have rings of no, one or two points beside good ones
    if data.get("bbox"):
        return {"xywh": data["bbox"], "clip": True}
    raise RequestError("annotation: expected a segmentation or a bbox, got none")


def stated_area(data: dict[str, Any]) -> float | None:
    """Return the area that an annotation states, in pixels; None where that is no number, or none of any use."""
    area = data.get("area")
    try:
        return float(area) if isinstance(area, int | float) and math.isfinite(area) else None
    except OverflowError:  # hundreds of digits
        return None


def stated_size(image: Any) -> tuple[int, int] | None:
    """Return the width and height that an image's description states; None where they are no sides of an image."""
    if not isinstance(image, dict):
        return None
    width, height = _whole(image.get("width")), _whole(image.get("height"))
    return None if width is None or height is None or min(width, height) < 1 else (width, height)


def annotation_id(data: Mapping[str, Any]) -> Id | None:
    """Return an annotation's id where it is a text or a whole number, which may be written as 7.0."""
    identity = data.get("id")
    return identity if isinstance(identity, str) else _whole(identity)


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _key(value: Any) -> str:
    """Return an id as what it is found by: 7 and 7.0 are one."""
    whole = _whole(value)
    return json.dumps(value if whole is None else whole)


def image_folders(path: Path, reading: Reading) -> list[Path]:
    """Where images of an annotation file may lie: as told, or beside it, in images/, in COCO's val2017/, or above."""
    if reading.images is not None:
        return [reading.images]
    split = path.stem.rsplit("_", 1)[-1]
    beside, above = path.parent, Path(os.path.normpath(path.parent / ".."))
    near = [beside, beside / "images", above / split, above / "images" / split, above, above / "images"]
    return [folder for folder in near if os.path.isdir(folder)]


def _image_row(image: dict[str, Any]) -> tuple[str, str | None, str | None, str | None]:
    size = stated_size(image)
    return _key(image.get("id")), *_file_names(image), None if size is None else json.dumps(size)


def _file_names(image: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return an image's name, and another that it may have.

    LVIS has only a URL: its last part is the name, with COCO's folder before it where images of several lie together.
    """
    if isinstance(image.get("file_name"), str):
        return str(image["file_name"]), None
    url = image.get("coco_url")
    if not isinstance(url, str):
        return None, None
    *_, name = parts = url.rsplit("/", 2)[-2:]
    return "/".join(parts), name
