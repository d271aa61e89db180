"""Which vision half is the fastest on this CPU: measured once for a checkpoint, and kept beside its export."""

import json
import logging
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from garserve.checkpoint import Checkpoint, expected_tensors
from garserve.model.device import has_gpu
from garserve.model.fingerprint import VISION_PREFIXES

if TYPE_CHECKING:
    import torch

LEAST_WEIGHTS = 20_000_000  # a tower with fewer takes milliseconds, whatever computes it
LEAST_GAIN = 1.1  # a smaller one is lost in what a session needs beside the tower's own memory
_ROUNDS = 3
_NO_DOUBT = 3.0  # a first run is not that much slower than others
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_log = logging.getLogger("garserve")


def may_measure(checkpoint: Checkpoint) -> bool:
    """Say whether ONNX Runtime comes into question where nobody chose: a large tower, on a CPU, with its packages."""
    if has_gpu() or not all(map(find_spec, _PACKAGES)):
        return False
    shapes = expected_tensors(checkpoint.config)
    weights = sum(prod(shape) for name, shape in shapes.items() if name.startswith(VISION_PREFIXES))
    return weights >= LEAST_WEIGHTS


def onnx_is_faster(checkpoint: Checkpoint, exported: Path, dtype: str) -> bool:
    """Say whether one tile takes less time in an exported tower on ONNX Runtime's CPU provider than in torch.

    `dtype` is torch's ("bfloat16"); the exported tower is float32's. What was measured is kept in
    `fastest-DTYPE.json` in the folder `exported`, and holds for the same processor, threads and versions. Where it
    cannot be kept, it is used all the same, and measured anew by the next that asks.
    """
    path, conditions = exported / f"fastest-{dtype}.json", _conditions()
    kept = _read(path)
    if kept.get("conditions") != conditions:
        _log.warning("measuring once which is faster here: the tower in torch, or in ONNX Runtime")
        kept = {"conditions": conditions, "seconds": _seconds(checkpoint, exported, dtype)}
        _keep(path, kept)
    seconds = kept["seconds"]
    return bool(seconds["torch"] >= LEAST_GAIN * seconds["onnx"])


def _keep(path: Path, kept: dict[str, Any]) -> None:
    """Write a file whole or not at all; a cache that cannot be written takes nothing away from what was measured."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        _log.warning("what was measured cannot be kept, and is measured at each start (%s)", error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _seconds(checkpoint: Checkpoint, exported: Path, dtype: str) -> dict[str, float]:
    """Return medians for one tile, in turns, after one run of each; those first runs where they leave no doubt."""
    import torch
    from garserve.export.samples import random_tiles
    from garserve.export.source import load_encoder

    from garserve.inputs.tiles import pack_mask
    from garserve.model.onnx_vision import OnnxVision

    encoder, session = load_encoder(checkpoint).to(getattr(torch, dtype)), OnnxVision(exported, provider="cpu")
    sample = random_tiles(checkpoint.config, 1)
    bits = pack_mask(sample.masks.bool())

    def run(vision: "OnnxVision | None") -> "torch.Tensor":
        encoder.vision = vision
        with torch.inference_mode():
            return encoder.features(sample.tiles, bits)

    times: dict[str, list[float]] = {"torch": [], "onnx": []}
    for _ in range(1 + _ROUNDS):
        for name, vision in (("torch", None), ("onnx", session)):
            begun = time.perf_counter()
            run(vision)
            times[name].append(time.perf_counter() - begun)
        first = [spent[0] for spent in times.values()]
        if max(first) > _NO_DOUBT * min(first):
            break
    return {name: float(f"{median(spent[1:] or spent):.4g}") for name, spent in times.items()}


def _conditions() -> dict[str, Any]:
    import onnxruntime
    import torch

    versions = {"torch": str(torch.__version__), "onnxruntime": str(onnxruntime.__version__)}
    return {"processor": _processor(), "threads": torch.get_num_threads(), "garserve": version("garserve"), **versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    first = lines[: lines.index("") if "" in lines else None]
    return " ".join(line.partition(":")[2].strip() for line in first if line.startswith(("model name", "flags")))


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        seconds = held["seconds"]
        float(seconds["torch"]), float(seconds["onnx"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return dict(held)
