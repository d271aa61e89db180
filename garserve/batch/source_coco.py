"""COCO's and LVIS's instances, and DLC-Bench, which has the same form: one record an annotation.

The file may be larger than memory. It is parsed as a stream into a temporary table on disk, because annotations come
in any order and those of one image belong together.
"""

import codecs
import json
import math
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from garserve.batch.record import Record
from garserve.batch.source import Reading, check_local, located
from garserve.errors import InputError, RequestError

_TABLES = """
CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT, spare TEXT);
CREATE TABLE annotations (number INTEGER PRIMARY KEY, image TEXT, data TEXT);
"""


class CocoSource:
    """Annotations by image, images in the file's order."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        self.categories: frozenset[str] | None = None
        self._folders = image_folders(path, reading)

    def records(self) -> Iterator[Record]:
        """Yield every annotation; RequestError where the file is not COCO's JSON."""
        table = sqlite3.connect("")  # SQLite's own temporary file; it is gone with the connection
        try:
            categories = self._fill(table)
            (self.total,) = table.execute("SELECT count(*) FROM annotations").fetchone()
            rows = table.execute(
                "SELECT annotations.number, images.name, images.spare, annotations.data FROM annotations "
                "LEFT JOIN images ON images.id = annotations.image ORDER BY images.rowid, annotations.number"
            )
            last, image = None, ""
            for number, name, spare, data in rows:
                if name and name != last:  # annotations come image by image
                    last, image = name, self._located(name, spare)
                yield self._record(number, name, image, json.loads(data), categories)
        finally:
            table.close()

    def _located(self, name: str, spare: str | None) -> str:
        path = located(name, self._folders)
        if spare is None or os.path.isfile(path):
            return path
        flat = located(spare, self._folders)
        return flat if os.path.isfile(flat) else path

    def _fill(self, table: sqlite3.Connection) -> dict[str, str]:
        table.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        table.executemany(
            "INSERT OR IGNORE INTO images VALUES (?, ?, ?)",
            ((json.dumps(one.get("id")), *_file_names(one)) for one in items(self.path, "images.item")),
        )
        used: set[str] = set()  # ids of categories

        def annotations() -> Iterator[tuple[int, str, str]]:
            for number, one in enumerate(items(self.path, "annotations.item"), start=1):
                used.add(json.dumps(one.get("category_id")))
                yield number, json.dumps(one.get("image_id")), json.dumps(one)

        table.executemany("INSERT INTO annotations VALUES (?, ?, ?)", annotations())
        table.execute("CREATE INDEX by_image ON annotations (image, number)")
        names = {json.dumps(one.get("id")): str(one.get("name")) for one in items(self.path, "categories.item")}
        self.categories = frozenset(names.values()) | {str(json.loads(one)) for one in used - names.keys() - {"null"}}
        return names

    def _record(
        self, number: int, name: str | None, image: str, data: dict[str, Any], categories: dict[str, str]
    ) -> Record:
        place = f"annotation {number}"
        identity = data.get("id") if isinstance(data.get("id"), str | int) else None
        if not name:
            return Record(place, identity, error=f"image_id: no image {data.get('image_id')!r:.80} in {self.path.name}")
        try:
            check_local("file_name", name)
            region = annotation_region(data)
        except InputError as error:
            return Record(place, identity, image_name=image, error=str(error))
        known = data.get("category_id")
        return Record(
            place=place,
            id=identity,
            image=image,
            image_name=image,
            regions=(region,),
            category=categories.get(json.dumps(known), None if known is None else str(known)),
            area=stated_area(data),
        )


def items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array one by one; RequestError where the file is not JSON."""
    try:
        with path.open("rb") as file:
            skip_mark(file)
            for one in ijson.items(file, prefix, use_float=True):
                yield one if isinstance(one, dict) else {}
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise RequestError(f"input {path}: not JSON ({' '.join(str(error).split())[:120]})") from None


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


def image_folders(path: Path, reading: Reading) -> list[Path]:
    """Where images of an annotation file may lie: as told, or beside it, in images/, in COCO's val2017/, or above."""
    if reading.images is not None:
        return [reading.images]
    split = path.stem.rsplit("_", 1)[-1]
    beside, above = path.parent, Path(os.path.normpath(path.parent / ".."))
    near = [beside, beside / "images", above / split, above / "images" / split, above, above / "images"]
    return [folder for folder in near if os.path.isdir(folder)]


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
