"""Checks of what happens before the model: image, tiles, masks, boxes, prompt."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from garserve.conformance.case import Case, Finding, count_different, largest_difference
from garserve.inputs.images import load_image
from garserve.inputs.processor import PreparedRequest, Processor, draw_masks
from garserve.inputs.roi import cells_box

BOX_LIMIT = 1e-6
PIXEL_LIMIT = 1.0  # grey levels of 255


def check_inputs(case: Case, processor: Processor, prepared: PreparedRequest) -> Iterator[Finding]:
    """Compare a prepared request with the recording, piece by piece."""
    data, arrays = case.data, case.arrays

    def finding(check: str, error: float, limit: float = 0.0, note: str = "") -> Finding:
        return Finding(case.name, check, error, limit, note)

    image = load_image(case.folder / data["image"]["file"])
    same = hashlib.sha256(image.tobytes()).hexdigest() == data["image"]["sha256_rgb"]
    yield finding("image sha256", float(not same))
    item = prepared.items[0]
    region = prepared.items[1].roi
    grid = region.grid if region else (0, 0)
    yield finding("grid", float(grid != (data["tiles_w"], data["tiles_h"])), note=f"{grid[0]}x{grid[1]}")

    ours = item.tiles[..., 5::14, 5::14].int()
    golden = arrays["pixel_u8_sample"].int()
    equal = sum(
        hashlib.sha256(tile.numpy().tobytes()).hexdigest() == digest
        for tile, digest in zip(item.tiles, data["tile_sha256_u8"], strict=False)
    )
    note = f"{count_different(ours, golden):g} of {golden.numel()} sampled differ; "
    note += f"{equal} of {len(item.tiles)} tiles bitwise equal"
    yield finding("pixels (grey levels)", largest_difference(ours, golden), PIXEL_LIMIT, note)

    packed = arrays["mask_tiles_packed"]
    yield finding("mask tiles (bytes)", count_different(item.masks, packed))
    bits = torch.from_numpy(np.unpackbits(item.masks.numpy(), axis=-1))
    areas = torch.tensor(data["mask_tile_area"])
    yield finding("mask tile areas", count_different(bits.sum(dim=(1, 2)), areas))
    if "mask_id_sample" in arrays:
        known = (arrays["mask_id_sample"] != processor.config.prompt_count).to(torch.uint8)
        yield finding("mask sample", count_different(bits[..., 5::14, 5::14], known))
    masks = draw_masks(case.request().parsed_regions(), *image.shape[:2])
    wrong = sum(int(mask.sum()) != region["area"] for mask, region in zip(masks, data["regions"], strict=True))
    yield finding("region areas", float(wrong))

    boxes = np.asarray([region["bbox"] for region in data["regions"]])
    if not case.raw:
        yield finding("boxes, normalised", float(np.abs(case.own_boxes() - boxes).max()), BOX_LIMIT)
    cells = torch.tensor([[0.0, *cells_box(tuple(box), grid, processor.config.tokens_per_side)] for box in boxes])
    golden_cells = arrays["roi_boxes_feature"]
    scale = float(golden_cells.abs().max().clamp(min=1.0))
    yield finding("boxes, feature cells", largest_difference(cells, golden_cells) / scale, BOX_LIMIT, "relative")
    yield from _check_prompt(case, prepared, processor)


def _check_prompt(case: Case, prepared: PreparedRequest, processor: Processor) -> Iterator[Finding]:
    data = case.data
    ids = torch.tensor(prepared.token_ids, dtype=torch.int32)
    yield Finding(case.name, "token ids", count_different(ids, case.arrays["input_ids"]), 0.0, f"{len(ids)} tokens")
    in_text = sorted(prepared.spans[1:], key=lambda span: prepared.token_ids[span[0]])
    spans = [list(prepared.spans[0]), *map(list, in_text)]
    wrong = sum(a != b for a, b in zip(spans, [data["image_token_span"], *data["crop_spans"]], strict=True))
    yield Finding(case.name, "placeholder spans", float(wrong), 0.0)
    begins = prepared.token_ids.count(processor.tokenizer.special("<|begin_of_text|>"))
    yield Finding(case.name, "begin-of-text tokens", float(abs(begins - data["bos_count"])), 0.0)
