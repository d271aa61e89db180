"""Which options an engine on vLLM takes, told before a checkpoint is fetched or its tower exported."""

from collections.abc import Mapping
from typing import Any

from garserve.errors import GarserveError, RequestError, first_line
from garserve.model.tile_cache import DEFAULT_GB, TileCache
from garserve.vllm_plugin.arguments import quiet, refuse_unknown

_OWN = {"separate_process", "tile_cache_gb", "verbose"}  # garserve's, beside vLLM's EngineArgs
_REVISIONS = ("revision", "code_revision", "tokenizer_revision")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RequestError for an option that is none of this vLLM's, or that would have another checkpoint run.

    vLLM is imported only where there is an option of its own to check; GarserveError where that fails.
    """
    TileCache(options.get("tile_cache_gb", DEFAULT_GB))
    _check_source(options)
    named = set(options) - _OWN
    if not named:
        return
    quiet(verbose=bool(options.get("verbose")))
    try:
        refuse_unknown(named)
    except RequestError:
        raise
    except Exception as error:  # vLLM is not installed, or built for another machine
        raise GarserveError(f"vLLM did not start ({type(error).__name__}: {first_line(error)})") from error


def _check_source(options: Mapping[str, Any]) -> None:
    """Refuse what says where weights come from: vLLM gets the folder that garserve has opened."""
    if options.get("model") is not None:
        raise RequestError(f"engine option 'model': the checkpoint is named already, got {options['model']!r:.80}, too")
    for name in _REVISIONS:
        if options.get(name) is not None:
            raise RequestError(
                f"engine option {name!r}: expected none, got {options[name]!r:.80}: a repo is taken at its main "
                "revision; for another one, fetch it (hf download OWNER/NAME --revision REVISION --local-dir FOLDER) "
                "and load the folder"
            )
