"""What sources yield: one record for each answer that is wanted, not read or checked any further yet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    error: str | None = None

    @property
    def key(self) -> Id:
        """The id of the record's row."""
        return self.place.replace(" ", "-") if self.id is None else self.id


def id_text(identity: Id) -> str:
    """Return an id as text in which 5 and "5" differ and which any file takes."""
    return json.dumps(identity)
