"""vLLM as a backend of garserve's engine."""

from collections.abc import Callable
from typing import Any

from garserve.checkpoint import Checkpoint
from garserve.generation import OnReport, Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.vllm_plugin.driver import EngineDriver, engine_arguments, set_environment


class VLLMBackend:
    """Continuous batching and paged attention by vLLM, in this process unless told otherwise."""

    name = "vllm"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_num_tiles: int | None = None,
        separate_process: bool = False,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        """Start an engine; `options` are vLLM's EngineArgs (`max_model_len`, `gpu_memory_utilization`, …).

        `separate_process` runs the engine core in a process of its own: preparation and decoding then never wait
        for each other's interpreter lock, at the price of a second start.
        """
        set_environment(verbose=verbose, in_process=not separate_process)
        if max_num_tiles is not None:
            options["mm_processor_kwargs"] = {"max_num_tiles": max_num_tiles, **options.get("mm_processor_kwargs", {})}
        self.driver = EngineDriver(engine_arguments(checkpoint.folder, checkpoint.config, options))

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Queue a request; reports come from the engine's thread. Returns a function that cancels it."""
        return self.driver.submit(prepared, sampling, on_report)

    def close(self) -> None:
        """Stop the engine."""
        self.driver.close()
