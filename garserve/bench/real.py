"""Photographs with real masks: files of lines {"image": path, "regions": […]}, read as `garserve batch` reads them.

It is apart from workload.py, which is imported while time is taken: the readers of batches take long to import.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from garserve.batch.prepare import image_content
from garserve.batch.record import Record
from garserve.batch.source import Format
from garserve.batch.sources import open_source
from garserve.bench.workload import Workload
from garserve.errors import InputError
from garserve.inputs.images import hold_image
from garserve.inputs.regions import Region
from garserve.inputs.request import RegionRequest
from garserve.inputs.shapes import Mask


@dataclass(frozen=True)
class Photograph:
    """One line of a file: an image with at least one region."""

    image: NDArray[np.uint8]  # [H, W, 3], upright, read-only
    regions: list[Region]
    masks: list[Mask]  # bool [H, W], one a region


def photographs(path: Path) -> Iterator[Photograph]:
    """Yield every line that is not blank; relative paths of images and masks are taken from the file's folder.

    Raises InputError naming file, line and field where a line cannot be used, and where there is no line.
    """
    found = False
    for record in open_source(path, Format.jsonl).records():
        found = True
        try:
            photograph = _photograph(record)
        except InputError as error:
            raise InputError(f"{path}: {record.place}: {error}") from None
        yield photograph
    if not found:
        raise InputError(f'{path}: expected lines {{"image": path, "regions": [...]}}, got none')


def real_workload(path: Path, *, max_tokens: int) -> Workload:
    """Describe every region of a file of photographs by itself. Raises InputError, as `photographs` does."""
    requests: list[RegionRequest] = []
    images = 0
    for one in photographs(path):
        requests += [RegionRequest(one.image, [region], max_tokens=max_tokens) for region in one.regions]
        images += 1
    return Workload(path.name, requests, images)


def _photograph(record: Record) -> Photograph:
    if record.error is not None:
        raise InputError(record.error)
    if not record.regions:
        raise InputError("regions: expected at least one, got none")
    image = hold_image(image_content(record.image))
    regions, masks = [], []
    for number, data in enumerate(record.regions):
        try:
            region = Region.parse(data)
            mask = region.mask(*image.shape[:2])
        except InputError as error:
            raise InputError(f"regions[{number}]: {error}") from None
        regions.append(region)
        masks.append(mask)
    return Photograph(image, regions, masks)
