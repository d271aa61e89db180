"""Which records of an input a job answers."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from blake3 import blake3

from garserve.batch.record import Record
from garserve.errors import RegionError, RequestError
from garserve.inputs.encoded import SUFFIX
from garserve.inputs.rle import compressed_runs

_PART = re.compile(r"([0-9]{1,18})/([0-9]{1,18})")  # int() would take other digits, too, and refuse thousands of them


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: every record belongs to exactly one, and all records of an image to the same."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "i/n", i from 0; RequestError where it is not."""
        parts = _PART.fullmatch(text)
        if parts is not None and (index := int(parts[1])) < (count := int(parts[2])):
            return cls(index, count)
        raise RequestError(f"--shard: expected i/n with i from 0 to n - 1, got {text!r:.80}")

    def holds(self, record: Record, folders: Sequence[Path] = ()) -> bool:
        """Say whether a record belongs to the shard: by a hash of its image, as bytes or by its name.

        Of a path, what lies below the first of `folders` counts, so that each machine may have the data elsewhere; of
        one that was looked for in several folders, the name that the input states, so that it may also be missing.
        """
        image = record.image
        if isinstance(image, bytes):
            name = image
        elif record.image_name == "data URL":
            name = str(image).encode("ascii", "replace")
        else:
            stated = None if record.stated_image is None else os.path.normpath(record.stated_image)
            name = _below(stated or record.image_name or record.place, folders).encode("utf-8", "surrogatepass")
        return int.from_bytes(blake3(name).digest(8), "big") % self.count == self.index


@dataclass(frozen=True)
class Filters:
    """What is let through; areas in pixels. A record that cannot be used goes through any of them but the ids."""

    categories: frozenset[str] = frozenset()
    min_area: float | None = None
    max_area: float | None = None
    ids: frozenset[str] = frozenset()
    limit: int | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        for option, area in {"--min-area": self.min_area, "--max-area": self.max_area}.items():
            if area is not None and math.isnan(area):
                raise RequestError(f"{option}: expected a number of pixels, got {area}")

    def check_categories(self, known: frozenset[str], path: Path) -> None:
        """Check that an input has every category that is asked for; RequestError names one that it has not."""
        for name in sorted(self.categories - known):
            near = get_close_matches(name, known, n=1)
            meant = f", did you mean {near[0]!r}?" if near else f"; it has {len(known)} others"
            raise RequestError(f"--category: {name!r:.80} is no category of {path}{meant}")

    def of(self, records: Iterator[Record], folders: Sequence[Path] = ()) -> Iterator[Record]:
        """Yield the records that pass; of the first `limit` of them, those of the shard.

        `folders` are where images lie: for a shard, their names are what lies below one of them.
        """
        passing = islice((one for one in map(self._with_area, records) if self._passes(one)), self.limit)
        shard = self.shard
        return passing if shard is None else (one for one in passing if shard.holds(one, folders))

    def expected(self, total: int | None) -> int | None:
        """Return how many of `total` records pass, where that can be known beforehand."""
        if total is None or self.categories or self.ids or self.min_area is not None or self.max_area is not None:
            return None
        if self.shard is not None:  # images are of different shares
            return None
        return total if self.limit is None else min(total, self.limit)

    def _passes(self, record: Record) -> bool:
        if self.ids and str(record.key) not in self.ids:
            return False
        if record.error is not None:
            return True
        if self.categories and record.category not in self.categories:
            return False
        area = record.area
        return area is None or (
            (self.min_area is None or area >= self.min_area) and (self.max_area is None or area <= self.max_area)
        )

    def _with_area(self, record: Record) -> Record:
        """Measure the regions where an area is asked for and the source does not state it."""
        if (self.min_area is None and self.max_area is None) or record.area is not None or record.error is not None:
            return record
        try:
            return replace(record, area=_area(record))
        except RequestError as error:
            return replace(record, error=str(error))


def _area(record: Record) -> float | None:
    """Return the area of a record's regions in pixels; None where it has none, which is refused when it is prepared."""
    if record.regions:
        return sum(map(region_area, record.regions))
    if isinstance(record.image, str) and record.image.endswith(SUFFIX):
        raise RequestError("area: not known for an encoded image; filter by area needs RLE, polygon or box")
    return None


def _below(name: str, folders: Sequence[Path]) -> str:
    path = PurePath(name)
    for folder in folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return name


def region_area(region: Any) -> float:
    """Return a region's area in pixels without its image; RequestError where that cannot be known."""
    area = _measured(region)
    if not math.isfinite(area):
        raise RequestError(f"area: cannot be measured for the region {region!r:.80}")
    return area


def _measured(region: Any) -> float:
    try:
        if isinstance(region, dict) and ("rle" in region or "counts" in region):
            return _rle_area(region.get("rle", region))
        if isinstance(region, list) or (isinstance(region, dict) and "box" in region):
            x1, y1, x2, y2 = map(float, region["box"] if isinstance(region, dict) else region)
            return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)
        if isinstance(region, dict) and "xywh" in region:
            return float(region["xywh"][2]) * float(region["xywh"][3])
        if isinstance(region, dict) and "polygon" in region:
            return _polygon_area(region["polygon"])
    except (TypeError, ValueError, LookupError, OverflowError, RegionError, RecursionError):
        raise RequestError(f"area: cannot be measured for the region {region!r:.80}") from None
    raise RequestError(f"area: not known for a region like {region!r:.60}; filter by area needs RLE, polygon or box")


def _rle_area(rle: dict[str, Any]) -> float:
    counts = rle["counts"]
    if isinstance(counts, list):
        return float(sum(int(run) for run in counts[1::2]))
    return float(sum(compressed_runs(counts)[1::2]))


def _polygon_area(polygon: Any) -> float:
    """Sum the areas of rings, by the shoelace formula; holes and overlaps are not looked for."""
    first = polygon[0]
    if isinstance(first, list) and (len(first) != 2 or not isinstance(first[0], int | float)):
        return sum(map(_polygon_area, polygon))
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
