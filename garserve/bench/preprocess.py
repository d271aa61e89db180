"""From pixels and masks to what a model reads, without a model: what the front process spends on a request."""

import time
from pathlib import Path
from statistics import median

from garserve.bench.machine import peaks
from garserve.bench.result import Result, Row
from garserve.bench.workload import picture, region
from garserve.config import read_config
from garserve.inputs.processor import Processor
from garserve.inputs.request import RegionRequest
from garserve.tracing import recording

_STAGES = ("draw masks", "tile image", "tile masks", "assemble prompt")


def preprocess(folder: Path, size: tuple[int, int], regions: int, max_num_tiles: int | None, rounds: int) -> Result:
    """Prepare `regions` requests about one image of `size` (width, height), `rounds` times, each an image of its own.

    Raises RequestError where `max_num_tiles` is out of range.
    """
    processor = Processor(folder, read_config(folder), max_num_tiles=max_num_tiles)
    masks = [region(number, size) for number in range(regions)]
    first: list[float] = []
    later: list[float] = []
    stages: dict[str, list[float]] = {name: [] for name in _STAGES}
    for number in range(rounds):
        image = picture(number, size)
        with recording() as spans:
            times = []
            for mask in masks:
                start = time.perf_counter()
                prepared = processor(RegionRequest(image, [mask]))
                times.append(time.perf_counter() - start)
        first.append(times[0])
        later += times[1:]
        for name in _STAGES:
            stages[name].append(sum(span.seconds for span in spans if span.name == name))
    item = prepared.items[0]
    limit = (size[0] * size[1] * 3 + item.tiles.nbytes) / peaks().bytes
    rows: list[Row] = [{"": "first region of an image", "milliseconds": 1e3 * median(first), "limit ms": 1e3 * limit}]
    if later:
        mask_bytes = size[0] * size[1] + item.masks.nbytes  # a byte a pixel read, a bit a pixel written
        row = {"": "every other region", "milliseconds": 1e3 * median(later)}
        rows.append(row | {"limit ms": 1e3 * mask_bytes / peaks().bytes})
    for name in _STAGES:
        rows.append({"": f"{name}, all {regions} regions", "milliseconds": 1e3 * median(stages[name])})
    conditions = (
        f"{size[0]}x{size[1]} pixels, {regions} regions one by one, tiles of {processor.config.tile_size} pixels, "
        f"at most {processor.max_num_tiles}; medians of {rounds} images; limit: image (or mask) read and tiles written "
        "once, over the measured bandwidth of a copy"
    )
    return Result("preprocess", conditions, rows)
