"""WebDataset: tar shards in which files of one name belong together: the image, and NAME.json with its request.

NAME.json is a line of a requests file without "image"; with NAME.mask.png in place of "regions", it may be left out.
Shards are plain tar files, so that an image can be read where it lies.
"""

import base64
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from garserve.batch.record import Member, Record
from garserve.batch.source import Reading
from garserve.batch.source_folder import SUFFIXES
from garserve.batch.source_jsonl import line_record

_MASK = ".mask.png"


class WebDatasetSource:
    """One record a sample, shard by shard in the order of their names; ids are SHARD/NAME where the JSON has none."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        self._paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]

    def records(self) -> Iterator[Record]:
        """Yield every sample."""
        return chain.from_iterable(map(_shard, self._paths))


def _shard(path: Path) -> Iterator[Record]:
    try:
        with tarfile.open(path, "r:") as shard:
            files = (member for member in shard if member.isfile())
            for name, members in groupby(files, key=_sample_name):
                yield _sample(shard, path, name, list(members))
                shard.members = []  # type: ignore[attr-defined]  # tarfile would keep all that it has seen
    except (tarfile.TarError, OSError) as error:
        yield Record(path.name, error=f"{path}: not a plain tar file, or broken ({error})")


def _sample_name(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}" if folder else name.split(".", 1)[0]


def _sample(shard: tarfile.TarFile, path: Path, name: str, members: list[tarfile.TarInfo]) -> Record:
    place = f"{path.stem}/{name}"
    image, data = None, {}
    for member in members:
        suffix = member.name[len(name) :].lower()
        if suffix == ".json":
            try:
                data = json.loads(_content(shard, member))
            except (ValueError, RecursionError) as error:
                return Record(place, place, error=f"{member.name}: not JSON ({error})")
        elif suffix == _MASK:
            mask = "data:image/png;base64," + base64.b64encode(_content(shard, member)).decode()
            data = {"regions": [{"mask": mask}]} | data if isinstance(data, dict) else data
        elif suffix in SUFFIXES:
            image = member
    if image is None:
        return Record(place, place, error=f"expected an image among {[member.name for member in members]!r:.120}")
    return _record(data, place, Member(str(path.absolute()), image.offset_data, image.size, image.name))


def _record(data: Any, place: str, image: Member) -> Record:
    line = {"id": place, **data, "image": image.name} if isinstance(data, dict) else data
    record = line_record(line, place, Path())
    return replace(record, image=image, image_name=f"{image.path}::{image.name}") if record.error is None else record


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    return file.read() if file else b""
