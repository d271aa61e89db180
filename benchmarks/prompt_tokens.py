"""Tokens to prefill for regions of one picture at GAR-1B's shape: counted from prompts, nothing is run."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from garserve.batch.prepare import Preparation
from garserve.inputs.processor import PreparedRequest
from garserve.inputs.request import RegionRequest
from garserve.model.random_checkpoint import write_files
from garserve.presets import preset

REGIONS = 20  # of the picture, and of each picture of `batch.py`
BLOCK = 16  # tokens of a KV block of vLLM on a GPU


def released_shape(sizes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """Count a region's tokens in groups of one size, and in the groups of a job.

    `sizes` has for each job the size of the group that each of its regions was asked in.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, preprocessor = preset("GAR-1B")
        write_files(Path(folder), config, preprocessor, "")
        processor = Preparation(folder).processor()
    image = np.random.default_rng(0).integers(0, 255, (1792, 1792, 3)).astype(np.uint8)
    boxes = [{"box": [80 * i, 70 * i, 80 * i + 150, 70 * i + 200]} for i in range(REGIONS)]
    figures: dict[str, Any] = {}
    for group in (1, 2, 3, 4, 5):
        requests = []
        for start in range(0, REGIONS, group):
            regions = boxes[start : start + group]
            whole = RegionRequest(image, regions, "q")
            for number in range(len(regions)):
                question = f"Describe <Prompt{number}> in detail."
                request = (
                    RegionRequest(image, regions) if group == 1 else replace(whole, question=question, focus=[number])
                )
                requests.append(processor(request))
        figures[f"all in groups of {group}"] = round(_prefilled(requests) / REGIONS, 1)
    alone = figures["all in groups of 1"]
    for name, of_regions in sizes.items():
        mean = np.mean([figures[f"all in groups of {size}"] for size in of_regions])
        figures[f"{name}, as here"] = f"{mean:.1f} ({alone / mean:.2f} x fewer)"
    return figures


def _prefilled(requests: list[PreparedRequest]) -> int:
    """Count the tokens beyond the longest prefix, in whole blocks, that an earlier request has in common."""
    known: set[bytes] = set()
    total = 0
    for prepared in requests:
        # A placeholder stands for its item: positions of other items are other tokens.
        tokens: list[Any] = list(prepared.token_ids)
        for item, (start, stop) in zip(prepared.items, prepared.spans, strict=True):
            tokens[start:stop] = [item.hash] * (stop - start)
        blocks = [json.dumps(tokens[:end]).encode() for end in range(BLOCK, len(tokens), BLOCK)]
        hits = next((i for i, prefix in enumerate(blocks) if prefix not in known), len(blocks))
        total += len(tokens) - hits * BLOCK
        known.update(blocks)
    return total
