"""WebDataset: tar shards in which files of one name belong together: the image, and NAME.json with its request.

NAME.json is a line of a requests file without "image"; with NAME.mask.png in place of "regions", it may be left out.
It may also be what SA-1B says about an image. Shards are plain tar files, so that an image can be read where it lies.
They are read once through, so files of a sample have to follow one another.
"""

import base64
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

from garserve.batch.record import Member, Record
from garserve.batch.source import Reading
from garserve.batch.source_coco import stated_size
from garserve.batch.source_folder import SUFFIXES
from garserve.batch.source_jsonl import line_record
from garserve.batch.source_sa1b import annotation_records

_MASK = ".mask.png"
BESIDE = (".json", _MASK)  # of files that say something about the image of their name
_APART = "files of a sample have to follow one another (tar --sort=name)"
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = 257  # the byte of a header at which it calls itself one


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
            files = (member for member in shard if member.isfile() and _sample_name(member))
            for name, members in groupby(files, key=_sample_name):
                yield from _sample(shard, path, name, list(members))
                shard.members = []  # type: ignore[attr-defined]  # tarfile would keep all that it has seen
            with path.open("rb") as file:
                _check_end(file, shard.offset)
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError) as error:
        yield Record(path.name, error=f"{path}: not a plain tar file, or broken ({error})")


def _check_end(file: BinaryIO, end: int) -> None:
    """Check that a tar ends at byte `end`, where tarfile found no header; TarError where it does not.

    tarfile takes a header that is damaged for the end. Two blocks of zeros are one; a file that simply stops there is
    let pass, because some writers leave them out.
    """
    file.seek(end)
    for zeros in (file.read(_BLOCK), file.read(_BLOCK)):
        if zeros.strip(b"\0"):
            raise tarfile.ReadError(f"no header and no end at byte {end}")
    while piece := file.read(_BLOCK << 11):
        if any(piece.startswith(b"ustar", start) for start in range(_MAGIC, len(piece), _BLOCK)):
            raise tarfile.ReadError(f"more members after an end at byte {end}")


def _sample_name(member: tarfile.TarInfo) -> str:
    """Return what the names of a sample's files have in common, up to the first dot behind the folder.

    "" for a file of no sample: one without a dot, or whose name begins with one.
    """
    folder, slash, name = member.name.rpartition("/")
    stem, dot, _ = name.partition(".")
    return folder + slash + stem if stem and dot else ""


def _sample(shard: tarfile.TarFile, path: Path, name: str, members: list[tarfile.TarInfo]) -> Iterator[Record]:
    place = f"{path.stem}/{name}"
    image, data, masked = None, {}, {}
    suffixes = set()
    for member in members:
        suffix = member.name[len(name) :].lower()
        suffixes.add(suffix)
        if suffix == ".json":
            try:
                data = json.loads(_content(shard, member))
            except (ValueError, RecursionError) as error:
                yield Record(place, place, error=f"{member.name}: not JSON ({error})")
                return
        elif suffix == _MASK:
            mask = "data:image/png;base64," + base64.b64encode(_content(shard, member)).decode()
            masked = {"regions": [{"mask": mask}]}
        elif suffix in SUFFIXES:
            if image is not None:
                both = f"{image.name} and {member.name}"
                yield Record(place, place, error=f"two pictures: {both}; a mask is NAME{_MASK}")
                return
            image = Member(os.path.abspath(path), member.offset_data, member.size, member.name)
    if isinstance(data, dict):
        data = masked | data
    names = [member.name for member in members]
    # A picture or a mask alone is named by its file: the sample's name belongs to its JSON, which may stand elsewhere.
    if image is None:
        lone = place + next((suffix for suffix in BESIDE if suffix in suffixes), min(suffixes))
        key = place if ".json" in suffixes else lone
        yield Record(lone, key, error=f"expected an image among {names!r:.120}; {_APART}")
    elif suffixes.isdisjoint(BESIDE):
        lone = f"{path.stem}/{image.name}"
        yield Record(lone, lone, error=f"expected NAME.json or NAME{_MASK} among {names!r:.120}; {_APART}")
    elif _is_sa1b(data):
        name = f"{image.path}::{image.name}"
        yield from annotation_records(data["annotations"], place, image, name, stated_size(data["image"]))
    else:
        yield _record(data, place, image)


def _is_sa1b(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and "regions" not in data
        and isinstance(data.get("image"), dict)
        and isinstance(data.get("annotations"), list)
    )


def _record(data: Any, place: str, image: Member) -> Record:
    # A name of its own stands in for the member's, which may look like a URL, while the line is checked.
    line = {"id": place, **data, "image": "member"} if isinstance(data, dict) else data
    record = line_record(line, place, Path())
    return replace(record, image=image, image_name=f"{image.path}::{image.name}") if record.error is None else record


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    return file.read() if file else b""
