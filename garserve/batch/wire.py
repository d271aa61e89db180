"""Bundles as messages between processes and machines: JSON, and the bytes of an image that came as bytes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from garserve.batch.bundles import Bundle
from garserve.batch.record import ImageRef, Member, Record

_UNTOLD = (TypeError, ValueError, RecursionError)  # what JSON says of things that it has no form for


def bundle_messages(bundle: Bundle) -> list[bytes]:
    """Return a bundle as a JSON header, followed by its image where that is bytes."""
    image = bundle.records[0].image
    described: Any = {"bytes": True} if isinstance(image, bytes) else image
    if isinstance(image, Member):
        described = {"member": asdict(image)}
    # One image for all; records that came without one have an error, and do not get here together with others.
    records = [{**record.__dict__, "image": "", "options": dict(record.options)} for record in bundle.records]
    header = json.dumps({"image": described, "records": records, "wanted": bundle.wanted}).encode()
    return [header, image] if isinstance(image, bytes) else [header]


def told_messages(bundle: Bundle) -> list[bytes]:
    """Return a bundle's messages, in which a record that no JSON can hold has become one with an error."""
    try:
        return bundle_messages(bundle)
    except _UNTOLD:
        return bundle_messages(replace(bundle, records=tuple(map(_told, bundle.records))))


def _told(record: Record) -> Record:
    try:
        json.dumps([record.regions, dict(record.options)])
    except _UNTOLD as error:
        told = f"request cannot be handed to another process ({type(error).__name__}: {error})"
        return replace(record, regions=(), options={}, error=told)
    return record


def has_image(header: bytes) -> bool:
    """Say whether an image follows a header."""
    image = json.loads(header)["image"]
    return isinstance(image, dict) and "bytes" in image


def read_bundle(messages: Sequence[bytes]) -> Bundle:
    """Undo `bundle_messages`."""
    data = json.loads(messages[0])
    image = data["image"]
    if isinstance(image, dict):
        image = Member(**image["member"]) if "member" in image else messages[1]
    return Bundle(tuple(_record(one, image) for one in data["records"]), tuple(data["wanted"]))


def _record(described: dict[str, Any], image: ImageRef) -> Record:
    size = described["size"]
    described |= {"regions": tuple(described["regions"]), "size": None if size is None else tuple(size)}
    return Record(**{**described, "image": image})
