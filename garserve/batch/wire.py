"""Bundles as messages between processes and machines: JSON, and the bytes of an image that came as bytes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from garserve.batch.bundles import Bundle
from garserve.batch.record import Member, Record


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
    records = [Record(**{**one, "image": image, "regions": tuple(one["regions"])}) for one in data["records"]]
    return Bundle(tuple(records), tuple(data["wanted"]))
