"""Checks of the unit vectors: tiling decisions, resizing, region align, tokenizer, chat template."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from garserve.config import parse_config, read_config
from garserve.conformance.case import SCALES, Finding, count_different, largest_difference, relative_error
from garserve.conformance.inputs import BOX_LIMIT, PIXEL_LIMIT
from garserve.conformance.model import FEATURE_LIMIT
from garserve.inputs.prompts import DEFAULT_SYSTEM, chat_parts
from garserve.inputs.roi import cells_box, replay_roi
from garserve.inputs.tiles import choose_grid, resize_bicubic, resize_nearest
from garserve.inputs.tokenizer import GARTokenizer
from garserve.model.replay import replay
from garserve.presets import preset


def check_units(folder: Path) -> Iterator[Finding]:
    """Check whatever the folder's `unit/` holds."""
    unit = folder / "unit"
    for name, check in {
        "tiling.json": _tiling,
        "resize.safetensors": _resize,
        "roi_align.safetensors": _roi_align,
    }.items():
        if (unit / name).is_file():
            yield from check(unit / name)
    tokenizers = sorted(path.parent for path in folder.glob("*/tokenizer.json"))
    for checkpoint in tokenizers:
        tokenizer = GARTokenizer(checkpoint / "tokenizer.json", read_config(checkpoint))
        for name, check_text in {"tokenizer_cases.json": _tokenizer, "chat_cases.json": _chat}.items():
            if (unit / name).is_file():
                yield from check_text(unit / name, tokenizer, f"unit {checkpoint.name}")


def _tiling(path: Path) -> Iterator[Finding]:
    data = json.loads(path.read_text(encoding="utf-8"))
    wrong = [
        case
        for case in data["cases"]
        if choose_grid(case["width"], case["height"], case["max_num_tiles"], data["tile_size"])
        != (case["tiles_w"], case["tiles_h"])
    ]
    yield Finding("unit", "tiling decisions", len(wrong), 0.0, f"{len(data['cases'])} decisions")


def _resize(path: Path) -> Iterator[Finding]:
    arrays = load_file(path)
    for key in sorted(name for name in arrays if name.startswith("image_")):
        golden = arrays[key.replace("image", "bicubic")]
        ours = resize_bicubic(arrays[key], golden.shape[1], golden.shape[2])
        note = f"{count_different(ours, golden):g} of {golden.numel()} differ"
        yield Finding("unit", f"bicubic {key}", largest_difference(ours, golden), PIXEL_LIMIT, note)
    for key in sorted(name for name in arrays if name.startswith("ids_")):
        golden = arrays[key.replace("ids", "nearest")]
        yield Finding(
            "unit", f"nearest {key}", count_different(resize_nearest(arrays[key], *golden.shape), golden), 0.0
        )


def _roi_align(path: Path) -> Iterator[Finding]:
    arrays = load_file(path)
    config = parse_config(*preset("GAR-1B"))
    side = config.tokens_per_side
    boxes = [tuple(box) for box in arrays["boxes_normalised"].tolist()]
    for key in sorted(name for name in arrays if name.startswith("feature_")):
        number = key.removeprefix("feature_")
        channels, height, width = arrays[key].shape
        grid = (width // side, height // side)
        tiles = arrays[key].reshape(channels, grid[1], side, grid[0], side).permute(1, 3, 2, 4, 0)
        tiles = tiles.reshape(grid[0] * grid[1], side * side, channels).contiguous()
        cells = torch.tensor([cells_box(box, grid, side) for box in boxes])
        golden_cells = arrays[f"boxes_feature_{number}"]
        error = largest_difference(cells, golden_cells) / float(golden_cells.abs().max().clamp(min=1.0))
        yield Finding("unit", f"boxes {key}", error, BOX_LIMIT, "relative")
        for scale in SCALES:
            rois = [replay_roi(box, grid, config.with_box_scale(scale)) for box in boxes]
            rows = [replay(tiles[[i - 1 for i in roi.window.tile_indices(grid)]], roi, side) for roi in rois]
            ours = torch.stack(rows).transpose(1, 2).reshape(len(boxes), channels, side, side)
            yield Finding(
                "unit", f"{scale} {key}", relative_error(ours, arrays[f"{scale}_{number}"]), FEATURE_LIMIT, "relative"
            )


def _tokenizer(path: Path, tokenizer: GARTokenizer, name: str) -> Iterator[Finding]:
    cases = json.loads(path.read_text(encoding="utf-8"))
    wrong = sum(tokenizer.encode_parts(_parts(case["text"], tokenizer)) != case["ids"] for case in cases)
    yield Finding(name, "tokenizer, text to ids", wrong, 0.0, f"{len(cases)} texts")
    plain = [case for case in cases if all(isinstance(part, str) for part in _parts(case["text"], tokenizer))]
    wrong = sum(tokenizer.decode(case["ids"]) != case["decoded"] for case in plain)
    yield Finding(name, "tokenizer, ids to text", wrong, 0.0, f"{len(plain)} texts")


def _parts(text: str, tokenizer: GARTokenizer) -> list[str | int]:
    """Split a trusted text at its control tokens, as the authors' tokenizer does with every text."""
    pieces = re.split(r"(<\|[a-z0-9_]+\|>)", text)
    return [tokenizer.special(piece) if piece.startswith("<|") and piece.endswith("|>") else piece for piece in pieces]


def _chat(path: Path, tokenizer: GARTokenizer, name: str) -> Iterator[Finding]:
    cases = json.loads(path.read_text(encoding="utf-8"))
    wrong = sum(
        tokenizer.encode_parts(_render(case["messages"], tokenizer, case["add_generation_prompt"]))
        != tokenizer.encode_parts(_parts(case["text"], tokenizer))
        for case in cases
    )
    yield Finding(name, "chat template", wrong, 0.0, f"{len(cases)} conversations")


def _render(messages: list[dict[str, Any]], tokenizer: GARTokenizer, reply: bool) -> list[str | int]:
    system = DEFAULT_SYSTEM
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    turns: list[tuple[str, list[str | int]]] = []
    for message in messages:
        kinds = [part["type"] for part in message["content"]]
        content: list[str | int] = [
            tokenizer.special(f"<|{kind}|>") for kind in ("image", "video") for _ in range(kinds.count(kind))
        ]
        content += [part["text"].strip() for part in message["content"] if part["type"] == "text"]
        turns.append((message["role"], content))
    return chat_parts(system, turns, tokenizer, reply=reply)
