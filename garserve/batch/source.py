"""What every source is, and what a person may say about reading one."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from garserve.batch.record import Record
from garserve.errors import RequestError

_PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Format(StrEnum):
    """Forms of input."""

    jsonl = "jsonl"
    openai = "openai"
    coco = "coco"
    sa1b = "sa1b"
    gar_bench = "gar-bench"
    dlc_bench = "dlc-bench"
    folder = "folder"
    parquet = "parquet"
    webdataset = "webdataset"


@dataclass(frozen=True)
class Reading:
    """How to read: where images and masks lie if not where the format has them, and what to ask.

    `each_region` describes every region by itself, whatever the input asks about several of them.
    """

    images: Path | None = None
    masks: Path | None = None
    each_region: bool = False


class Source(Protocol):
    """Records of an input, one at a time and always in the same order.

    One whose input lists the categories that its records can have knows them as `categories` once it has begun.
    """

    path: Path
    total: int | None  # records, where known; some sources know it only once they have begun

    def records(self) -> Iterator[Record]:
        """Yield every record; what cannot be read becomes one with an error."""


def check_input(path: Path) -> None:
    """Check that an input is a file or a folder that can be read, and read again; RequestError where it is not.

    It is read several times: to see its format, to count it, and to answer it. A pipe would be empty by then.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            os.scandir(path).close()
            return
        if not stat.S_ISREG(kind):
            raise RequestError(f"input {path}: expected a file or a folder, got a pipe or device; write it to a file")
        with path.open("rb") as file:
            head = file.read(8)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"input {path}: no such file or folder") from None
    except OSError as error:
        raise RequestError(f"input {path}: cannot be read ({error.strerror or error})") from None
    for start, name in _PACKED.items():
        if head.startswith(start):
            raise RequestError(f"input {path}: is packed ({name}); expected it unpacked")


def check_local(field: str, name: str) -> None:
    """Check that an image is named by a path; RequestError where it is a URL, which nobody would fetch."""
    if _URL.match(name):
        raise RequestError(f"{field}: expected a path or a data URL, got {name!r:.80}; nothing is fetched")


def located(name: str, folders: Sequence[Path]) -> str:
    """Return the path of an image: in the first folder that has it, else in the first."""
    for folder in folders:
        if os.path.isfile(folder / name):  # Path.is_file raises where a name is too long
            return os.path.abspath(folder / name)
    return os.path.abspath(folders[0] / name)
