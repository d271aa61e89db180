"""SA-1B: one JSON file an image, beside it: one record an annotation."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from garserve.batch.record import ImageRef, Record
from garserve.batch.source import Reading, check_local, located
from garserve.batch.source_coco import annotation_id, annotation_region, stated_area, stated_size
from garserve.errors import InputError


class Sa1bSource:
    """A file, or a folder with any number of them."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        self._images = reading.images

    def records(self) -> Iterator[Record]:
        """Yield every annotation, file by file in the order of their names."""
        paths = sorted(annotation_files(self.path)) if self.path.is_dir() else [self.path]
        return chain.from_iterable(map(self._file, paths))

    def _file(self, path: Path) -> Iterator[Record]:
        try:
            data = json.loads(path.read_bytes())
            name = str(data["image"]["file_name"])
            annotations = list(data["annotations"])
            check_local("file_name", name)
        except InputError as error:
            yield Record(path.name, error=f"{path}: {error}")
            return
        except OSError as error:
            yield Record(path.name, error=f"{path}: cannot be read ({error.strerror})")
            return
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            yield Record(path.name, error=f"{path}: not the JSON of an SA-1B image ({type(error).__name__}: {error})")
            return
        image = located(name, [self._images or path.parent])
        yield from annotation_records(annotations, path.stem, image, image, stated_size(data["image"]))


def annotation_files(folder: Path) -> Iterator[Path]:
    """Yield the JSON files of a folder, in no order, but what a job left there about its output."""
    return (path for path in folder.glob("*.json") if not path.name.endswith(".job.json"))


def annotation_records(
    annotations: list[Any], place: str, image: ImageRef, name: str, size: tuple[int, int] | None
) -> Iterator[Record]:
    """Yield a record for each annotation of an image, which rows call `name`.

    `place` is where the image stands, `size` the width and height that are stated of it.
    """
    for number, annotation in enumerate(annotations, start=1):
        yield _record(annotation, f"{place} annotation {number}", image, name, size)


def _record(annotation: Any, place: str, image: ImageRef, name: str, size: tuple[int, int] | None) -> Record:
    if not isinstance(annotation, dict):
        return Record(place, image_name=name, error=f"annotation: expected an object, got {annotation!r:.80}")
    identity = annotation_id(annotation)
    try:
        region = annotation_region(annotation)
    except InputError as error:
        return Record(place, identity, image_name=name, error=str(error))
    return Record(place, identity, image, name, (region,), area=stated_area(annotation), size=size)
