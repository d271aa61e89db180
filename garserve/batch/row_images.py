"""The pictures that rows of an output name: files, members of tar shards, rows of Parquet files."""

import os
import re
import tarfile
from bisect import bisect_right
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from garserve.batch.source_parquet import parquet_module
from garserve.errors import ImageError, InputError
from garserve.inputs.images import load_image
from garserve.inputs.shapes import Mask

_FILES = 4  # tars, and files of Parquet, of which is kept what they hold
_NO_FILE = "data URL"  # what rows call a picture that came within its request
_CONTAINERS = (".tar", ".parquet")


class Shown(NamedTuple):
    """What of an output is shown: its rows, and how many pictures that they name could not be read."""

    rows: int
    missing: int


class RowImages:
    """Reads the pictures of rows; what it has seen of a tar or a Parquet file is kept for the rows that follow.

    `missing` holds the names of files that could not be read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Take the folder in which pictures lie now, if not where they were."""
        self.missing: set[str] = set()
        self._folder = folder
        self._members = lru_cache(_FILES)(_tar_members)
        self._parquet = lru_cache(_FILES)(_parquet_file)
        self._cells = lru_cache(1)(self._row_group)

    def read(self, name: str) -> NDArray[np.uint8] | None:
        """Return a row's picture as RGB uint8 [H, W, 3]; None where it is gone or was never a file."""
        image = self._read(name)
        if image is None and name != _NO_FILE:
            self.missing.add(name)
        return image

    def _read(self, name: str) -> NDArray[np.uint8] | None:
        path, member = self._found(name)
        try:
            if member is None:
                return load_image(path)
            is_tar = path.suffix.lower() == ".tar"
            return load_image(self._member(path, member) if is_tar else self._cell(path, int(member)))
        except (InputError, ValueError, LookupError, TypeError, OSError, NotImplementedError):
            return None

    def _found(self, name: str) -> tuple[Path, str | None]:
        """Return the file of a picture, and what is behind "::" where it lies in one; paths may have "::", too."""
        if self._folder is None and os.path.isfile(name):
            return Path(name), None
        separators = [match.span() for match in re.finditer("::", name)]
        for start, end in separators:
            container = self._placed(name[:start])
            if os.path.isfile(container):
                return container, name[end:]
        if any(name[:start].lower().endswith(_CONTAINERS) for start, _ in separators):
            return Path(name), None  # of a container that is gone: a file with a member's name is another picture
        return self._placed(name), None

    def _placed(self, name: str) -> Path:
        return Path(name) if self._folder is None else _moved(Path(name), self._folder)

    def _member(self, path: Path, name: str) -> bytes:
        offset, size = self._members(path)[name]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _cell(self, path: Path, number: int) -> bytes:
        _, ends = self._parquet(path)
        if not 0 <= number < ends[-1]:
            raise ImageError(f"{path}: has no row {number}")
        group = bisect_right(ends, number)
        start = ends[group - 1] if group else 0
        cell: Any = self._cells(path, group)[number - start].as_py()
        return bytes(cell["bytes"] if isinstance(cell, dict) else cell)

    def _row_group(self, path: Path, group: int) -> Any:
        file, _ = self._parquet(path)
        return file.read_row_group(group, columns=["image"])["image"]


def _moved(path: Path, folder: Path) -> Path:
    """Return where a picture lies in a folder: by as much of the end of its path as the folder has."""
    parts = path.parts[1:] if path.is_absolute() else path.parts
    placed = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((one for one in placed if os.path.isfile(one)), folder / path.name)


def _parquet_file(path: Path) -> tuple[Any, list[int]]:
    """Return an open Parquet file, and the row at which each of its row groups ends."""
    file = parquet_module().ParquetFile(path)
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
    return file, list(accumulate(sizes))


def _tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the files of a tar lie, as offset and size in bytes; of a broken one, those that can be read."""
    found = {}
    with suppress(tarfile.TarError, OSError, ValueError, ArithmeticError), tarfile.open(path, "r:") as shard:
        for member in shard:
            if member.isfile():
                found[member.name] = (member.offset_data, member.size)
            shard.members = []  # type: ignore[attr-defined]  # tarfile would keep all that it has seen
    return found


def thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the image with its longer side at most `side` pixels."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def row_masks(row: dict[str, Any], height: int, width: int) -> list[Mask]:
    """Return the masks of a row's regions at another size, [height, width]; none where they cannot be read."""
    masks = []
    for rle in row.get("regions", []):
        try:
            mask = Image.fromarray(coco.decode(rle) * np.uint8(255))
        except (TypeError, ValueError, LookupError, AttributeError):
            return []
        # An area's mean, so that a region of a few pixels does not vanish.
        masks.append(np.asarray(mask.resize((width, height), Image.Resampling.BOX)) >= 64)
    return masks
