"""The exported tower in an ONNX Runtime session, as a RegionEncoder's `vision`.

Tensors are bound where they lie, on the CPU or on a CUDA device; nothing passes through numpy.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from garserve.errors import OnnxError, first_line
from garserve.model.device import has_gpu
from garserve.model.onnx_file import ModelInfo, model_path, read_info, require
from garserve.model.patch_tokens import unpack

_SUFFIX = "ExecutionProvider"
_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
UINT8, FLOAT = 2, 1  # onnx.TensorProto's numbers


def find_provider(asked: str | None) -> str:
    """Return ONNX Runtime's name of an execution provider: "cpu", "CUDA", "OpenVINO", or the whole name.

    None is CUDA where both it and a device are here, and the CPU otherwise. Raises OnnxError where the installed
    ONNX Runtime does not have the provider.
    """
    available = require("onnxruntime").get_available_providers()
    if asked is None:
        cuda = _CUDA[0] in available and has_gpu()
        return _CUDA[0] if cuda else "CPUExecutionProvider"
    wanted = asked.lower().removesuffix(_SUFFIX.lower())
    for name in available:
        if str(name).lower().removesuffix(_SUFFIX.lower()) == wanted:
            return str(name)
    names = ", ".join(name.removesuffix(_SUFFIX) for name in available)
    raise OnnxError(f"vision backend onnx:{asked:.40}: this ONNX Runtime has no such provider; installed: {names}")


def check_model(path: Path, fingerprint: str | None) -> ModelInfo:
    """Check that a vision model is whole and, where a fingerprint is given, this checkpoint's. Raises OnnxError."""
    info = read_info(path)
    if fingerprint is not None and info.checkpoint != fingerprint:
        raise OnnxError(
            f"{model_path(path)}: exported from another checkpoint: expected the vision half {fingerprint}, "
            f"got {info.checkpoint}"
        )
    return info


class OnnxVision:
    """One session that computes any number of tiles."""

    def __init__(
        self, path: Path, *, provider: str | None = None, fingerprint: str | None = None, threads: int | None = None
    ) -> None:
        """Check a model (a file, or its folder) and open a session on it.

        `provider` is as `find_provider` takes it; `fingerprint` is that of the checkpoint whose tower it stands for;
        `threads` on a CPU are torch's own number by default. Raises OnnxError.
        """
        runtime = require("onnxruntime")
        self.provider = find_provider(provider)
        self.info = check_model(path, fingerprint)
        settings = self.info.config
        self.tile_size, self.width = int(settings["vision"]["image_size"]), int(settings["hidden_size"])
        self.tokens = int(settings["tokens_per_side"]) ** 2
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.provider in _CUDA else _CPU
        self.session = _open(runtime, model_path(path), self.provider, self.device, threads or torch.get_num_threads())

    def __call__(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compute uint8 tiles [T, 3, S, S] with packed masks [T, S, ceil(S/8)] to float32 features [T, n², C]."""
        side = self.tile_size
        self._expect("tiles", tiles, [len(tiles), 3, side, side])
        self._expect("masks", masks, [len(tiles), side, -(-side // 8)])
        return self.run(tiles, unpack(masks.to(self.device), side))

    def run(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compute uint8 tiles [T, 3, S, S] with uint8 masks [T, S, S], 0 where unmarked; float32 [T, n², C].

        Raises OnnxError for another shape or dtype.
        """
        side = self.tile_size
        self._expect("tiles", tiles, [len(tiles), 3, side, side])
        self._expect("masks", masks, [len(tiles), side, side])
        tiles, masks = tiles.to(self.device).contiguous(), masks.to(self.device).contiguous()
        out = torch.empty(len(tiles), self.tokens, self.width, device=self.device)
        if not len(tiles):
            return out
        binding = self.session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for name, tensor in (("tiles", tiles), ("masks", masks)):
            binding.bind_input(name, *place, UINT8, list(tensor.shape), tensor.data_ptr())
        binding.bind_output("features", *place, FLOAT, list(out.shape), out.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # pybind's classes of ONNX Runtime's error codes
            why = first_line(error)
            raise OnnxError(f"vision model on {self.provider}: {len(tiles)} tiles failed ({why:.300})") from None
        binding.synchronize_outputs()
        return out

    def _expect(self, name: str, tensor: torch.Tensor, shape: list[int]) -> None:
        if tensor.dtype != torch.uint8 or list(tensor.shape) != shape:
            wanted = ["T", *shape[1:]]
            raise OnnxError(
                f"{name}: expected uint8 [{', '.join(map(str, wanted))}], got {tensor.dtype} {list(tensor.shape)}"
            )


_CPU = torch.device("cpu")


def _open(runtime: Any, path: Path, provider: str, device: torch.device, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    _free_threads(options, threads)
    place = {} if device.index is None else {"device_id": str(device.index)}  # by itself it takes the first GPU
    try:
        session = runtime.InferenceSession(str(path), options, providers=[(provider, place)])
    except Exception as error:  # pybind's classes of ONNX Runtime's error codes
        raise OnnxError(f"{path}: refused by ONNX Runtime on {provider} ({first_line(error):.300})") from None
    if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU in silence
        raise OnnxError(f"{path}: {provider} is installed but does not start here; got {session.get_providers()}")
    return session


def _free_threads(options: Any, threads: int) -> None:
    """Let the session's threads run on all of the process's cores.

    They inherit the cores of the thread that opens the session, and vLLM binds its own to a single one.
    """
    tasks = Path("/proc/self/task")
    if threads < 2 or not tasks.is_dir() or len(os.sched_getaffinity(0)) >= threads:
        return
    cores: set[int] = set()
    for task in tasks.iterdir():
        with suppress(OSError):  # the thread has ended
            cores |= os.sched_getaffinity(int(task.name))
    numbers = ",".join(str(core + 1) for core in sorted(cores))  # ONNX Runtime counts from 1
    options.add_session_config_entry("session.intra_op_thread_affinities", ";".join([numbers] * (threads - 1)))
