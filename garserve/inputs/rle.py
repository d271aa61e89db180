"""COCO run-length encodings, checked before pycocotools decodes them: it trusts their length."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from garserve.errors import RegionError


def decode_rle(rle: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decode {"size": [height, width], "counts": str | bytes | list of runs} to a mask [height, width].

    A run of 0 pixels is one, as COCO has it. Raises RegionError where the size is not the image's, or the runs do not
    fill it exactly.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise RegionError(f'rle: expected {{"size": [height, width], "counts": ...}}, got {rle!r:.80}')
    try:
        size = [int(side) for side in rle["size"]]
    except (TypeError, ValueError, OverflowError):
        size = []
    if size != [height, width]:
        raise RegionError(
            f"rle: size: expected the image's [height, width] [{height}, {width}], got {rle['size']!r:.80}"
        )
    counts = rle["counts"]
    runs = compressed_runs(counts) if isinstance(counts, str | bytes) else _runs_of_list(counts, height * width)
    if sum(runs) != height * width:
        raise RegionError(f"rle: counts: expected runs of {height * width} pixels in all, got {sum(runs)}")
    encoded: dict[str, Any] = {"size": size, "counts": counts}
    if not isinstance(counts, str | bytes):
        encoded = coco.frPyObjects({"size": size, "counts": runs}, height, width)
    return coco.decode(encoded).astype(np.bool_)


def _runs_of_list(counts: Any, most: int) -> list[int]:
    """Return the runs of a list, each of 0 to `most` pixels; RegionError where they are none.

    What is refused is not repeated: Python writes no number of more than 4,300 digits.
    """
    try:
        runs = [int(run) for run in counts]
    except (TypeError, ValueError, OverflowError):
        raise RegionError(f"rle: counts: expected a string or a list of whole numbers, got {counts!r:.80}") from None
    for position, run in enumerate(runs):
        if not 0 <= run <= most:
            got = "fewer" if run < 0 else "more"
            raise RegionError(f"rle: counts: expected runs of 0 to {most} pixels, got {got} at position {position}")
    return runs


def compressed_runs(counts: str | bytes) -> list[int]:
    """Return the runs of COCO's compressed form; RegionError where it is none.

    A character has 5 bits from "0", low bits first, bit 6 for more; from the fourth run on, a run is stored as its
    difference to the run two before (cocoapi, maskApi.c).
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise RegionError(f"rle: counts: not COCO's compressed form at character {error.start}") from None
    runs: list[int] = []
    value = shift = 0
    for position, byte in enumerate(data):
        code = byte - 48
        if not 0 <= code < 64 or shift > 25:  # no run needs a seventh
            raise RegionError(f"rle: counts: not COCO's compressed form at character {position}")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        run = value + runs[-2] if len(runs) > 2 else value
        if run < 0:
            raise RegionError(f"rle: counts: a run of {run} pixels at character {position}")
        runs.append(run)
        value = shift = 0
    if shift:
        raise RegionError("rle: counts: cut off in the middle of a run")
    return runs
