"""Records of one image brought together: what one worker prepares at a time, so that the image is read once."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from garserve.batch.record import Member, Record

WINDOW = 512  # records looked at ahead of the next one, to find others of its image
_WINDOW_BYTES = 64_000_000  # of images and masks that came as bytes or data URLs
LARGEST = 24  # records of a bundle


@dataclass(frozen=True)
class Bundle:
    """Records of one image; those that are not `wanted` were answered before, and only complete their groups."""

    records: tuple[Record, ...]
    wanted: tuple[bool, ...]


def gather(records: Iterator[Record], *, group: int = 1) -> Iterator[tuple[Record, ...]]:
    """Yield records in bundles of one image, in the order in which the images first come.

    A window of records is gathered at a time, so that memory does not depend on the input's length. Bundles are the
    same whenever the input is: groups of `group` records never lie across two.
    """
    largest = max(LARGEST // group, 1) * group
    for window in _windows(records):
        by_image: dict[Hashable, list[Record]] = {}
        for record in window:
            by_image.setdefault(_image_key(record), []).append(record)
        for of_image in by_image.values():
            for start in range(0, len(of_image), largest):
                yield tuple(of_image[start : start + largest])


def _windows(records: Iterator[Record]) -> Iterator[list[Record]]:
    window: list[Record] = []
    size = 0
    for record in records:
        window.append(record)
        size += _bytes_held(record)
        if len(window) >= WINDOW or size >= _WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _bytes_held(record: Record) -> int:
    """Return how much a record holds: an image's bytes or data URL, and its masks'."""
    held = len(record.image) if isinstance(record.image, bytes | str) else 0
    masks = (region.get("mask") for region in record.regions if isinstance(region, dict))
    return held + sum(len(mask) for mask in masks if isinstance(mask, str))


def _image_key(record: Record) -> Hashable:
    if record.error is not None:
        return ("unusable", record.place)
    image = record.image
    if isinstance(image, Member):
        return (image.path, image.offset)
    return blake3(image).digest() if isinstance(image, bytes) else image
