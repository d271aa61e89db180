"""Prepared requests of one image as they travel from a worker: arrays and plain data, nothing that runs on arrival."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from garserve.batch.record import Id
from garserve.inputs.processor import KEY_BYTES, Item, PreparedRequest, make_item
from garserve.inputs.roi import RoI, Window


@dataclass(frozen=True)
class Rows:
    """Embeddings of one item that were computed elsewhere: bits of [tokens, C] in a torch dtype, and its hash."""

    bits: NDArray[np.uint8]  # [tokens, C · bytes of a value]
    dtype: str
    hash: str

    @classmethod
    def of(cls, item: Item) -> "Rows":
        """Take the embeddings of an item that has them."""
        if item.rows is None:
            raise ValueError("rows: expected an item of an encoded image")
        bits = item.rows.contiguous().view(torch.uint8).numpy()
        return cls(bits, str(item.rows.dtype).removeprefix("torch."), item.hash)

    def item(self, tiles: torch.Tensor, masks: torch.Tensor) -> Item:
        """Return the item again; `tiles` and `masks` are empty."""
        return Item(tiles, masks, (), None, self.hash, torch.from_numpy(self.bits).view(getattr(torch, self.dtype)))


@dataclass(frozen=True)
class Entry:
    """One prepared request: everything but the image's tiles, which all entries of a parcel share."""

    record: int  # position in the bundle
    token_ids: NDArray[np.int32]
    masks: NDArray[np.uint8]  # [T, S, ceil(S/8)]
    keys: bytes  # 16 for each tile
    rois: list[dict[str, Any]]
    spans: list[list[int]]
    boxes: list[list[float]]
    max_tokens: int
    temperature: float
    seed: int | None
    form: str  # "single", "several", "group of K"
    rows: tuple[Rows, ...] = ()  # of every item, where the image came encoded
    group: Sequence[Id] = ()  # of the records whose regions are <Prompt0>, <Prompt1>, …, where the prompt has others'


@dataclass(frozen=True)
class Parcel:
    """What became of a bundle: `tiles` uint8 [T, 3, S, S], entries, errors by record, and each record's regions.

    `regions` are compressed RLEs, `seconds` what the preparation took.
    """

    tiles: NDArray[np.uint8]
    entries: list[Entry] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    regions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0

    def prepared(self, entry: Entry) -> PreparedRequest:
        """Return an entry as the engine takes it."""
        tiles, masks = torch.from_numpy(self.tiles), torch.from_numpy(entry.masks)
        keys = [entry.keys[start : start + KEY_BYTES] for start in range(0, len(entry.keys), KEY_BYTES)]
        if entry.rows:
            items = [rows.item(tiles, masks) for rows in entry.rows]
        else:
            items = [make_item(tiles, masks, tuple(keys), None)]
        for data in entry.rois:
            roi = RoI(tuple(data["box"]), tuple(data["grid"]), Window(*data["window"]))
            chosen = roi.window.tile_indices(roi.grid)
            items.append(make_item(tiles[chosen], masks[chosen], tuple(keys[i] for i in chosen), roi))
        spans = [(start, stop) for start, stop in entry.spans]
        boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in entry.boxes]
        return PreparedRequest(entry.token_ids.tolist(), items, spans, boxes)

    def to_messages(self) -> list[bytes | memoryview]:
        """Return the parcel as messages: a JSON header, then its arrays."""
        masks: dict[int, int] = {}  # the entries of a group have one array
        arrays: list[NDArray[Any]] = [self.tiles]
        rows = []
        for entry in self.entries:
            if id(entry.masks) not in masks:
                masks[id(entry.masks)] = len(arrays)
                arrays.append(entry.masks)
            arrays.append(entry.token_ids)
            row = {**entry.__dict__, "keys": entry.keys.hex(), "masks": masks[id(entry.masks)]}
            row["token_ids"] = len(arrays) - 1
            row["rows"] = [[len(arrays) + i, one.dtype, one.hash] for i, one in enumerate(entry.rows)]
            arrays += [one.bits for one in entry.rows]
            rows.append(row)
        shapes = [[array.dtype.str, *array.shape] for array in arrays]
        header = {
            "arrays": shapes,
            "entries": rows,
            "errors": list(self.errors.items()),
            "regions": list(self.regions.items()),
            "seconds": self.seconds,
        }
        return [json.dumps(header).encode(), *map(_bytes_of, arrays)]

    @classmethod
    def from_messages(cls, header: bytes, contents: Sequence[bytes]) -> "Parcel":
        """Undo `to_messages`."""
        data = json.loads(header)
        arrays = [
            np.frombuffer(bytearray(content), dtype=kind).reshape(shape)
            for content, (kind, *shape) in zip(contents, data["arrays"], strict=True)
        ]
        entries = [
            Entry(
                **{
                    **row,
                    "keys": bytes.fromhex(row["keys"]),
                    "masks": arrays[row["masks"]],
                    "token_ids": arrays[row["token_ids"]],
                    "rows": tuple(Rows(arrays[index], dtype, name) for index, dtype, name in row["rows"]),
                }
            )
            for row in data["entries"]
        ]
        return cls(arrays[0], entries, dict(data["errors"]), dict(data["regions"]), data["seconds"])


def _bytes_of(array: NDArray[Any]) -> bytes | memoryview:
    return np.ascontiguousarray(array).data.cast("B") if array.size else b""


def array_count(header: bytes) -> int:
    """Return how many arrays follow a header."""
    return len(json.loads(header)["arrays"])
