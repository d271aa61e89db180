"""What garserve tells vLLM: engine arguments, sampling parameters, and the environment of an engine's start."""

import dataclasses
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from garserve.config import GARConfig
from garserve.errors import RequestError
from garserve.generation import Sampling
from garserve.model.tile_cache import DEFAULT_GB
from garserve.openmp import environment as openmp_environment

if TYPE_CHECKING:
    from vllm import SamplingParams

# Named by its path: the CPU build takes "uni" for "mp".
_IN_ENGINE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
# By which options of garserve's the entries of `hf_overrides` are chosen.
_OWN_OPTIONS = {
    "replay_box_scale": "box_scale",
    "tile_cache_gb": "tile_cache_gb",
    "vision_model": "vision_model",
    "vision_provider": "vision_backend",
}
_set_here: set[str] = set()  # variables of the environment that are there for the start of an engine


def engine_arguments(
    folder: Path,
    config: GARConfig,
    options: dict[str, Any],
    *,
    in_process: bool = True,
    tile_cache_gb: float = DEFAULT_GB,
    vision: tuple[Path, str | None] | None = None,
) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs: garserve's choices, and over them whatever `options` says.

    `vision` is an exported tower with the execution provider to run it on. `hf_overrides` in `options` are merged with
    garserve's own (`merged_overrides`).

    Raises RequestError for an option that this vLLM does not have, and for overrides against garserve's own options.
    """
    from vllm.platforms import current_platform

    exported = {} if vision is None else {"vision_model": str(vision[0]), "vision_provider": vision[1]}
    chosen: dict[str, Any] = {
        "model": str(folder),
        "dtype": config.dtype,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "hf_overrides": {"replay_box_scale": config.replay_box_scale, "tile_cache_gb": tile_cache_gb, **exported},
        "worker_extension_cls": "garserve.vllm_plugin.worker.WorkerExtension",
        "scheduler_cls": "garserve.vllm_plugin.scheduler.make_scheduler",
    }
    if in_process:
        chosen["mm_processor_cache_gb"] = 0  # nothing is sent anywhere, so there is nothing to save
    if current_platform.is_cpu():
        # Compiling takes half a minute; profiling runs the tower over a full image, of which a CPU has no use.
        chosen |= {"enforce_eager": True, "skip_mm_profiling": True}
    else:
        # Room for three of GAR-1B's images of 4,352 tokens; in vLLM's least, 2,048, one takes three steps.
        chosen["max_num_batched_tokens"] = 16384
    refuse_unknown(options)
    overrides = merged_overrides(chosen["hf_overrides"], options.get("hf_overrides"))
    return chosen | options | {"hf_overrides": overrides}


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise RequestError for a name that is no field of vLLM's EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs

    if unknown := sorted(set(names) - {field.name for field in dataclasses.fields(EngineArgs)}):
        raise RequestError(f"engine option {unknown[0]!r} is none of vLLM's (see vllm.EngineArgs)")


def merged_overrides(chosen: dict[str, Any], given: Any) -> Any:
    """Return garserve's own entries of vLLM's `hf_overrides` together with the user's.

    `given` is a dict; or None, for no more entries; or a function of the config, which is then called with garserve's
    entries in it. Its `tile_cache_gb` takes the place of garserve's default.

    Raises RequestError where `given` is none of these, or says something else than an option of garserve's own.
    """
    if given is None or given is chosen:
        return chosen
    if callable(given):
        return partial(_override, chosen, given)
    if not isinstance(given, Mapping):
        raise RequestError(f"hf_overrides: expected an object of names and values, got {given!r:.80}")
    for name in sorted(set(chosen) & set(given)):
        default = name == "tile_cache_gb" and chosen[name] == DEFAULT_GB
        if given[name] != chosen[name] and not default:
            raise RequestError(
                f"hf_overrides: expected {name} as by garserve's own option {_OWN_OPTIONS[name]} "
                f"({chosen[name]!r:.80}), got {given[name]!r:.80}; give it by that option alone"
            )
    return {**chosen, **given}


def _override(chosen: dict[str, Any], given: Callable[[Any], Any], config: Any) -> Any:
    config.update(chosen)
    return given(config)


def ranks(arguments: Mapping[str, Any]) -> int:
    """Return how many workers an engine of these arguments has, all replicas together."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return math.prod(arguments.get(name) or 1 for name in sizes)


def worker_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by which a single worker on a CPU runs inside its engine's process.

    vLLM's CPU build starts another process for it, where it can bind threads to cores before they are there: a third of
    a start, 600 MB of memory, and a message there and back for each step. So that stays where the user set how to bind.
    """
    from vllm.platforms import current_platform

    bound = _BIND in os.environ and _BIND not in _set_here
    asked = arguments.get("distributed_executor_backend") or bound
    if asked or ranks(arguments) > 1 or not current_platform.is_cpu():
        return {}
    return {"distributed_executor_backend": _IN_ENGINE_PROCESS}


def sampling_params(sampling: Sampling) -> "SamplingParams":
    """Return vLLM's parameters; tokens come back as ids alone, and only the authors' stop token ends an answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=[sampling.stop_id],
        ignore_eos=True,
        detokenize=False,
        logprobs=-1 if sampling.first_logits else None,
        output_kind=RequestOutputKind.DELTA if sampling.stream else RequestOutputKind.FINAL_ONLY,
    )


def quiet(*, verbose: bool) -> None:
    """Keep vLLM's log to errors unless asked for more. To be called before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not verbose:
        logging.getLogger("vllm").setLevel(logging.ERROR)  # vLLM speaks before it has read its own level
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # looks for a CUDA toolkit, and tells
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


_environment = threading.Lock()


@contextmanager
def engine_environment(workers: int, *, separate_process: bool) -> Iterator[None]:
    """Set what vLLM reads from the environment while an engine starts; whatever the user has set stays.

    Engines start one after the other: the environment is the whole process's.

    `workers` is the number of ranks on this machine that share its cores.
    """
    from vllm.envs import disable_envs_cache
    from vllm.platforms import current_platform

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(len(cores) // workers, 1)
    shares = [cores[i * share % len(cores) :][:share] for i in range(workers)]
    wanted = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # A fork of a process that has asked CUDA anything cannot use it, and may stand still in OpenMP.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # vLLM's own choice leaves a core idle for its API server, which is half of a small machine.
        _BIND: "|".join(",".join(map(str, own)) for own in shares),
    }
    if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":  # for the processes that vLLM starts
        wanted |= {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with _environment:
        changed = {name: value for name, value in wanted.items() if name not in os.environ}
        if separate_process and current_platform.is_cpu():
            changed |= openmp_environment()
        # By this one vLLM chooses its process mode, and on a CPU its executor. An engine in this process, once it has
        # started, holds all of vLLM's variables as they were then.
        disable_envs_cache()
        changed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if separate_process else "0"
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        _set_here.update(changed)
        try:
            yield
        finally:
            _set_here.clear()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
