"""What every source is, and what a person may say about reading one."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from garserve.batch.record import Record


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
    """Records of an input, one at a time and always in the same order."""

    path: Path
    total: int | None  # records, where known; some sources know it only once they have begun

    def records(self) -> Iterator[Record]:
        """Yield every record; what cannot be read becomes one with an error."""


def located(name: str, folders: Sequence[Path]) -> str:
    """Return the path of an image: in the first folder that has it, else in the first."""
    for folder in folders:
        if (folder / name).is_file():
            return os.path.abspath(folder / name)
    return os.path.abspath(folders[0] / name)
