"""vLLM as a backend of garserve's engine."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from garserve.checkpoint import Checkpoint
from garserve.errors import GarserveError, RequestError, first_line
from garserve.generation import OnReport, Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.model.tile_cache import DEFAULT_GB, TileCache, TileCounts
from garserve.vllm_plugin.arguments import engine_arguments, quiet
from garserve.vllm_plugin.driver import EngineDriver

_process_lock = threading.Lock()


def _on_gpu() -> bool:
    """Say whether vLLM runs on something else than the CPU."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def _refuse_replicas(options: Mapping[str, Any]) -> None:
    """One thread and one client of vLLM's drive one engine: with more, vLLM would wait for ever for an answer."""
    if (asked := options.get("data_parallel_size")) not in (None, 1):
        raise RequestError(
            f"data_parallel_size: expected 1, since an engine loaded here is a single one, got {asked!r:.80}; for more "
            "of them take `garserve batch --ray local --engines N`, or `garserve serve CHECKPOINT -- "
            "--data-parallel-size N`"
        )


class VLLMBackend:
    """Continuous batching and paged attention by vLLM, in this process unless told otherwise."""

    name = "vllm"
    _in_process: "ClassVar[VLLMBackend | None]" = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_num_tiles: int | None = None,
        tile_cache_gb: float = DEFAULT_GB,
        separate_process: bool | Literal["gpu"] = False,
        verbose: bool = False,
        vision: tuple[Path, str | None] | None = None,
        **options: Any,
    ) -> None:
        """Start an engine; `options` are vLLM's EngineArgs (`max_model_len`, `gpu_memory_utilization`, …).

        `tile_cache_gb` (10⁹ bytes, on each rank) is kept for features of tiles; 0 computes them anew in every step.
        `separate_process` runs the engine core in a process of its own: preparation and decoding then never wait
        for each other's interpreter lock, at the price of a second start; "gpu" does so unless vLLM runs on the CPU.
        `vision` is an exported tower and the execution provider to run it on, in the place of the checkpoint's own.

        Raises RequestError for options that cannot be, GarserveError where vLLM does not start.
        """
        try:
            _refuse_replicas(options)
            quiet(verbose=verbose)
            apart = _on_gpu() if separate_process == "gpu" else separate_process
            if max_num_tiles is not None:
                options["mm_processor_kwargs"] = {
                    "max_num_tiles": max_num_tiles,
                    **options.get("mm_processor_kwargs", {}),
                }
            arguments = engine_arguments(
                checkpoint.folder,
                checkpoint.config,
                options,
                in_process=not apart,
                tile_cache_gb=TileCache(tile_cache_gb).gigabytes,
                vision=vision,
            )
            if not apart:
                self._claim_process()
            self.driver = EngineDriver(arguments, separate_process=apart, on_end=self._release_process)
            chunked = self.driver.engine.vllm_config.scheduler_config.enable_chunked_prefill
            self._takes_seeds = _on_gpu() or not chunked
        except GarserveError:
            self._release_process()
            raise
        except Exception as error:  # but for Ctrl-C, after which the engine may still be starting
            self._release_process()
            raise GarserveError(f"vLLM did not start ({type(error).__name__}: {first_line(error)})") from error

    def _claim_process(self) -> None:
        """vLLM keeps its process groups in globals: the engine that closes first would take them from the other."""
        with _process_lock:
            if (other := VLLMBackend._in_process) is not None:
                if hasattr(other, "driver"):
                    state, advice = "runs in this process already", "close it first"
                else:
                    state, advice = "is starting in this process (after Ctrl-C: to be closed then)", "try again later"
                raise GarserveError(f"a vLLM engine {state}: {advice}, or load with separate_process=True")
            VLLMBackend._in_process = self

    def _release_process(self) -> None:
        with _process_lock:
            if VLLMBackend._in_process is self:
                VLLMBackend._in_process = None

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Queue a request; reports come from the engine's thread. Returns a function that cancels it.

        Raises RequestError for a seed that would stop the engine: vLLM's CPU build ends with «CPU Generator does not
        use offset» where a prompt with a seed is prefilled in parts.
        """
        if sampling.seed is not None and sampling.temperature and not self._takes_seeds:
            raise RequestError(
                "seed: vLLM's CPU build takes none with a temperature above 0, unless loaded with "
                "enable_chunked_prefill=False"
            )
        return self.driver.submit(prepared, sampling, on_report)

    def tile_counts(self) -> TileCounts:
        """Return what became of the tiles so far, on the first rank (all ranks compute the same)."""
        return TileCounts(**self.driver.call(lambda engine: engine.collective_rpc("tile_counts"))[0])

    def token_room(self) -> int | None:
        """Return how many tokens the KV cache holds."""
        cache = self.driver.engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None

    def close(self) -> None:
        """Stop the engine."""
        self.driver.close()
