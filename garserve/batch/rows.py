"""What a row of the output says."""

from typing import Any

from garserve.answers import Answer
from garserve.batch.grouping import own_first
from garserve.batch.parcel import Entry, Parcel
from garserve.batch.record import Record, request_digest


def answer_row(record: Record, entry: Entry, parcel: Parcel, answer: Answer, engine_seconds: float) -> dict[str, Any]:
    """Return the row of an answer.

    `prepare_s` is the record's share of its bundle, `engine_s` from entry to end; by `request` it is noticed when the
    input has another request under the same id. `asked` is there where other than all of `regions` were asked about,
    `group` where the prompt had regions of other records: in the text, <Prompt0> is the record's own, as it is in its
    question, and all are named in the order of these ids.
    """
    text, group = answer.text, list(entry.group)
    if len(group) > 1:
        own = group.index(record.key)
        text = own_first(text, own)
        group[0], group[own] = group[own], group[0]
    row: dict[str, Any] = {
        "id": record.key,
        "text": text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "answer_tokens": len(answer.token_ids),
        "prepare_s": round(parcel.seconds / max(len(parcel.entries), 1), 4),
        "engine_s": round(engine_seconds, 4),
        "form": entry.form,
        "request": request_digest(record),
    }
    if len(group) > 1:
        row["group"] = group
    row |= _origin(record) | {"regions": parcel.regions.get(entry.record, [])}
    asked = len(entry.spans) - 1  # without the image's
    return row if asked == len(row["regions"]) else row | {"asked": asked}


def error_row(record: Record, error: str, regions: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the row of a record that has no answer."""
    return {"id": record.key, "error": error, **_origin(record), **({"regions": regions} if regions else {})}


def _origin(record: Record) -> dict[str, Any]:
    origin: dict[str, Any] = {"place": record.place}
    if record.image_name:
        origin["image"] = record.image_name
    if record.category is not None:
        origin["category"] = record.category
    if record.options.get("question") is not None:
        origin["question"] = record.options["question"]
    return origin
