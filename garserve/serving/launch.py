"""`garserve serve`: vLLM's own server with garserve's choices of arguments and the endpoint plugin in it."""

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from garserve.checkpoint import Checkpoint
from garserve.errors import GarserveError, RequestError, first_line
from garserve.export.choice import choose_vision
from garserve.model.tile_cache import DEFAULT_GB, TileCache
from garserve.serving.settings import KEY_VARIABLES, Settings
from garserve.vllm_plugin.arguments import (
    engine_arguments,
    engine_environment,
    merged_overrides,
    quiet,
    ranks,
    worker_arguments,
)
from garserve.vllm_plugin.options import check_options

PLUGIN = "garserve"
ENGINE_LOST = 1
_ENDPOINTS = "vllm.endpoint_plugins"
_ASKING = ("lora_hf_hub_resolver",)  # downloads from the Hub, where VLLM_PLUGINS names it
_PLUGIN_GROUP = re.compile(r"vllm\.\w+_plugins")  # vllm/plugins/__init__.py names them


@dataclass(frozen=True)
class Launch:
    """What is served, and where."""

    checkpoint: str
    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_workers: int = 1
    max_num_tiles: int | None = None
    box_scale: Any = None
    tile_cache_gb: float | None = None
    vision_backend: str | None = None
    vision_model: str | Path | None = None
    engine_options: dict[str, Any] = field(default_factory=dict)
    vllm_arguments: Sequence[str] = ()
    verbose: bool = False


def serve(launch: Launch) -> int:
    """Serve until told to stop, and return the exit code: 0 after an orderly end, 1 when the engine was lost.

    Raises CheckpointError, RequestError or GarserveError where it cannot start.
    """
    check_options(launch.engine_options)
    opened = Checkpoint.open(launch.checkpoint)
    if launch.box_scale is not None:
        opened = replace(opened, config=opened.config.with_box_scale(launch.box_scale))
    dtype = launch.engine_options.get("dtype", "auto")
    vision = choose_vision(opened, launch.vision_backend, launch.vision_model, dtype=dtype)
    quiet(verbose=launch.verbose)
    _prepare_environment()
    arguments = _arguments(launch, opened, vision)
    with engine_environment(ranks(vars(arguments)), separate_process=True):
        return _run(arguments)


def _prepare_environment() -> None:
    given = os.environ.get("VLLM_PLUGINS")
    named = _installed_plugins() if given is None else [name for name in given.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, PLUGIN]))
    for name in KEY_VARIABLES:  # garserve's gate has them; vLLM's own would refuse in another shape
        os.environ.pop(name, None)


def _installed_plugins() -> list[str]:
    """Return the plugins that vLLM would load by itself: naming one of them is otherwise refusing all others.

    What vLLM has only where it is named stays out: endpoint plugins, what shares a name with one, and `_ASKING`.
    """
    names: dict[str, None] = {}
    for group in sorted(entry_points().groups):
        if _PLUGIN_GROUP.fullmatch(group) and group != _ENDPOINTS:
            names |= dict.fromkeys(entry.name for entry in entry_points(group=group))
    closed = {*_ASKING, *(entry.name for entry in entry_points(group=_ENDPOINTS))}
    return [name for name in names if name not in closed]


def _arguments(launch: Launch, opened: Checkpoint, vision: Any) -> Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # where 0.33 has them
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    options = dict(launch.engine_options)
    if launch.max_num_tiles is not None:
        options["mm_processor_kwargs"] = {"max_num_tiles": launch.max_num_tiles}
    gigabytes = TileCache(DEFAULT_GB if launch.tile_cache_gb is None else launch.tile_cache_gb).gigabytes
    chosen = engine_arguments(
        opened.folder, opened.config, options, in_process=False, tile_cache_gb=gigabytes, vision=vision
    )
    own = {
        "disable_log_stats": False,  # the metrics
        "mm_processor_cache_gb": 0,  # items are made by garserve's own processor, not by vLLM's
        "generation_config": "vllm",  # what a request does not say is garserve's choice, not a file's
        "host": launch.host,
        "port": launch.port,
        "served_model_name": [launch.model_name or Path(launch.checkpoint).name or opened.folder.resolve().name],
        "api_server_count": launch.api_workers,
        "shutdown_timeout": int(launch.settings.drain_seconds),  # for an engine that hears Ctrl-C or SIGTERM itself
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "info" if launch.verbose else "warning",
    }
    chosen |= {name: value for name, value in own.items() if name not in options}
    parser = make_arg_parser(FlexibleArgumentParser(prog="garserve serve CHECKPOINT --"))
    parser.set_defaults(**chosen)
    arguments = parser.parse_args(list(launch.vllm_arguments))
    arguments.hf_overrides = merged_overrides(chosen["hf_overrides"], arguments.hf_overrides)
    if arguments.api_key:
        raise RequestError("--api-key: give it to garserve serve itself, before the --")
    vars(arguments).update(worker_arguments(vars(arguments)))
    arguments.garserve = launch.settings
    validate_parsed_serve_args(arguments)
    return arguments


def _run(arguments: Namespace) -> int:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    from garserve.serving import lifecycle

    try:
        if (arguments.api_server_count or 1) > 1:
            from vllm.entrypoints.cli.serve import run_multi_api_server

            arguments.headless = False
            run_multi_api_server(arguments)
        else:
            arguments.api_server_count = None
            uvloop.run(run_server(arguments))
    except KeyboardInterrupt:
        return 130
    except GarserveError:
        raise
    except Exception as error:
        raise GarserveError(f"vLLM did not serve ({type(error).__name__}: {first_line(error)})") from error
    return ENGINE_LOST if lifecycle.engine_lost else 0
