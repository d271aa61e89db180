"""What an engine computes with, as its figures depend on it: where its tower runs, and the dtypes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garserve.engine import Engine
from garserve.model.onnx_file import read_info
from garserve.model.reference_backend import ReferenceBackend
from garserve.vllm_plugin.backend import VLLMBackend


@dataclass(frozen=True)
class Runtime:
    """The tower in words, and names of torch's dtypes ("float32") whose peaks limits are counted from."""

    tower: str  # "torch, float32" or "ONNX Runtime (CPUExecutionProvider), int8"
    tower_peak: str  # dtype; an exported tower is held against float32's peak, whatever it is stored in
    dtype: str  # of decoder, KV cache and replay
    graphs: bool = False  # whether a GPU replays decoding steps as graphs, in which no part of the model is seen

    def __str__(self) -> str:
        return f"tower in {self.tower}, decoder in {self.dtype}"


def runtime(engine: Engine) -> Runtime:
    """Return what an engine runs: its options decided, and for a large tower on a CPU a measurement at its start."""
    backend: Any = engine.backend
    dtype, exported, graphs = engine.processor.config.dtype, None, False
    if isinstance(backend, VLLMBackend):
        config = backend.driver.engine.vllm_config
        model, mode = config.model_config, config.compilation_config.cudagraph_mode
        graphs = mode is not None and bool(mode.has_full_cudagraphs())
        dtype, path = _name(model.dtype), model.hf_config.vision_model
        exported = None if path is None else (model.hf_config.vision_provider, read_info(Path(path)).dtype)
    elif isinstance(backend, ReferenceBackend):
        vision: Any = backend.model.encoder.vision
        dtype = _name(backend.model.language_model.dtype)
        exported = None if vision is None else (vision.provider, vision.info.dtype)
    if exported is None:
        return Runtime(f"torch, {dtype}", dtype, dtype, graphs)
    provider, stored = exported
    return Runtime(f"ONNX Runtime ({provider}), {stored}", "float32", dtype, graphs)


def stages_seen(engine: Engine) -> bool:
    """Say whether the model runs in this process, where its spans are recorded, and not in one of vLLM's own."""
    backend: Any = engine.backend
    if not isinstance(backend, VLLMBackend):
        return True
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    executor = getattr(backend.driver.engine, "model_executor", None)  # none where the engine's core is elsewhere
    return isinstance(executor, UniProcExecutor)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
