"""GAR-Bench: a JSON array of questions with "image", "mask_rles", and "choices" where there are any."""

from collections.abc import Iterator
from pathlib import Path

from garserve.batch.record import Record
from garserve.batch.source import Reading
from garserve.batch.source_coco import items
from garserve.batch.source_jsonl import line_record


class GarBenchSource:
    """One record a question, asked as the authors' evaluation asks it; ids are positions from 0."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.total: int | None = None
        self._folder = reading.images or path.parent

    def records(self) -> Iterator[Record]:
        """Yield every question."""
        for number, one in enumerate(items(self.path, "item")):
            asked = {key: one[key] for key in ("image", "question", "choices", "type") if one.get(key) is not None}
            rles = one.get("mask_rles", [])
            regions = [{"rle": rle} for rle in rles] if isinstance(rles, list) else rles
            yield line_record(
                {"id": one.get("id", number), "regions": regions, **asked}, f"item {number}", self._folder
            )
