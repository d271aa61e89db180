"""What sources yield: one record for each answer that is wanted, not read or checked any further yet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from blake3 import blake3

Id = str | int


@dataclass(frozen=True)
class Member:
    """An image inside another file: `size` bytes from `offset`."""

    path: str
    offset: int
    size: int
    name: str


ImageRef = str | bytes | Member  # a path or data URL, the bytes of a file, or a part of one


@dataclass(frozen=True)
class Record:
    """One answer that is wanted: an image, its regions as Region.parse takes them, and fields of RegionRequest.

    A region {"mask": path, "value": v} is where the picture has the value v. `image_name` is what rows and messages
    call the image. A record that cannot be used has an `error`; without an `id`, its place in the input becomes it.
    """

    place: str  # "line 7", "annotation 12"
    id: Id | None = None
    image: ImageRef = ""
    image_name: str = ""
    regions: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    category: str | None = None
    area: float | None = None  # pixels, where the source says so
    size: tuple[int, int] | None = None  # width and height of the upright image, where the source says so
    error: str | None = None
    stated_image: str | None = None  # what the input calls an image that was looked for in several folders

    @property
    def key(self) -> Id:
        """The id of the record's row."""
        return self.place.replace(" ", "-") if self.id is None else self.id


def id_text(identity: Id) -> str:
    """Return an id as text in which 5 and "5" differ and which any file takes."""
    return json.dumps(identity)


def request_digest(record: Record) -> str:
    """Return a hash of what a record asks: its image's name or bytes, its regions, and its options.

    Of paths only the last part counts, so that a data set may be moved; image files are not opened.
    """
    image = record.image
    digest = blake3()
    if isinstance(image, bytes):
        digest.update(image)
    elif isinstance(image, Member):
        digest.update(image.name.encode("utf-8", "surrogatepass"))
    else:
        name = image if image.startswith("data:") else PurePath(image).name
        digest.update(name.encode("utf-8", "surrogatepass"))
    asked = [[_unplaced(region) for region in record.regions], dict(record.options)]
    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest(8)


def _unplaced(region: Any) -> Any:
    if isinstance(region, dict) and isinstance(region.get("mask"), str) and not region["mask"].startswith("data:"):
        return {**region, "mask": PurePath(region["mask"]).name}
    return region
