"""What a row of the output says."""

from typing import Any

from garserve.answers import Answer
from garserve.batch.parcel import Entry, Parcel
from garserve.batch.record import Record, request_digest


def answer_row(record: Record, entry: Entry, parcel: Parcel, answer: Answer, engine_seconds: float) -> dict[str, Any]:
    """Return the row of an answer.

    `prepare_s` is the record's share of its bundle, `engine_s` from entry to end; by `request` it is noticed when the
    input has another request under the same id.
    """
    row = {
        "id": record.key,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "answer_tokens": len(answer.token_ids),
        "prepare_s": round(parcel.seconds / max(len(parcel.entries), 1), 4),
        "engine_s": round(engine_seconds, 4),
        "form": entry.form,
        "request": request_digest(record),
    }
    return row | _origin(record) | {"regions": parcel.regions.get(entry.record, [])}


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
