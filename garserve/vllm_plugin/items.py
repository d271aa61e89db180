"""A PreparedRequest's items on their way into vLLM, and out of it again inside the model.

An image and a region are two kinds of item of vLLM's one modality "image": each is a contiguous run of placeholders,
and all items of a step reach the model in one call, so that tiles that they share are computed once.
"""

from typing import Any, cast

import torch
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from garserve.inputs.processor import KEY_BYTES, Item, PreparedRequest
from garserve.inputs.roi import RoI, Window

MODALITY = "image"


def engine_input(prepared: PreparedRequest) -> MultiModalInput:
    """Return a PreparedRequest as the input that `LLMEngine.add_request` and `AsyncLLM.generate` take."""
    return mm_input(
        prompt_token_ids=prepared.token_ids,
        mm_kwargs=MultiModalKwargsItems({MODALITY: [_to_kwargs(item) for item in prepared.items]}),
        mm_hashes={MODALITY: [item.hash for item in prepared.items]},
        mm_placeholders={MODALITY: [PlaceholderRange(start, end - start) for start, end in prepared.spans]},
    )


def share_with_engine(cache: BaseMultiModalProcessorCache, result: MultiModalInput) -> list[str]:
    """Replace items that the engine's process holds already, so that each is sent to it once.

    Returns the hashes of the others, which `cache` takes from now on for known there.
    """
    hashes = result["mm_hashes"][MODALITY]
    items = cast(list[Any], result["mm_kwargs"][MODALITY])
    for item_hash in hashes:
        cache.touch_sender_cache_item(item_hash)
    new = []
    try:
        for index, item_hash in enumerate(hashes):
            if not cache.is_cached_item(item_hash):
                new.append(item_hash)
            items[index], _ = cache.get_and_update_item((items[index], []), item_hash)
    finally:
        cache.release_sender_touches()
    return new


def _to_kwargs(item: Item) -> MultiModalKwargsItem:
    """Field names are the arguments of GARForRegions.embed_multimodal."""
    count, roi = len(item.tiles), item.roi
    window = roi.window if roi else Window(0, 0, 0, 0)
    grid = roi.grid if roi else (0, 0)
    plan = torch.tensor([count, *grid, window.top, window.bottom, window.left, window.right])
    # As bytes, so that items without rows can stand beside them, whatever their width and dtype.
    rows = item.tiles.new_empty(0) if item.rows is None else item.rows.contiguous().flatten().view(torch.uint8)
    box = torch.tensor(roi.box if roi else (0.0, 0.0, 0.0, 0.0), dtype=torch.float32)
    keys = torch.tensor(list(b"".join(item.keys)), dtype=torch.uint8).reshape(count, KEY_BYTES)
    whole = [slice(0, count)]
    return MultiModalKwargsItem(
        {
            "tiles": MultiModalFieldElem(item.tiles, MultiModalFlatField(slices=whole)),
            "masks": MultiModalFieldElem(item.masks, MultiModalFlatField(slices=whole)),
            "keys": MultiModalFieldElem(keys, MultiModalFlatField(slices=whole, keep_on_cpu=True)),
            "rows": MultiModalFieldElem(rows, MultiModalFlatField(slices=[slice(0, len(rows))])),
            "row_bytes": MultiModalFieldElem(torch.tensor(len(rows)), MultiModalBatchedField(keep_on_cpu=True)),
            "plan": MultiModalFieldElem(plan, MultiModalBatchedField(keep_on_cpu=True)),
            "box": MultiModalFieldElem(box, MultiModalBatchedField(keep_on_cpu=True)),
        }
    )


def items_from_kwargs(
    tiles: torch.Tensor,
    masks: torch.Tensor,
    keys: torch.Tensor,
    plan: torch.Tensor,
    box: torch.Tensor,
    rows: torch.Tensor,
    row_bytes: torch.Tensor,
    row_width: int,
    row_dtype: torch.dtype,
) -> list[Item]:
    """Take batched kwargs apart again: the inverse of `engine_input` for all items of a step.

    `tiles` [sum T, 3, S, S] and `masks` [sum T, S, B] uint8, `keys` [sum T, 16] uint8, `plan` [N, 7], `box` [N, 4],
    `rows` uint8, the bytes of all rows [tokens, `row_width`] of `row_dtype`, and `row_bytes` [N].
    """
    items, start, begin = [], 0, 0
    key_bytes = keys.numpy().tobytes()
    for row, corners, size in zip(plan.tolist(), box.tolist(), row_bytes.flatten().tolist(), strict=True):
        count, across, down, top, bottom, left, right = row
        stop = start + count
        own = tuple(key_bytes[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(start, stop))
        roi = None
        if across:
            x1, y1, x2, y2 = corners
            roi = RoI((x1, y1, x2, y2), (across, down), Window(top, bottom, left, right))
        given = rows[begin : begin + size].view(row_dtype).reshape(-1, row_width) if size else None
        items.append(Item(tiles[start:stop], masks[start:stop], own, roi, hash="", rows=given))
        start, begin = stop, begin + size
    return items
