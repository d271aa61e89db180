"""garserve: the deployment runtime for Grasp Any Region models.

>>> engine = garserve.load("path/or/repo-id")  # without an argument: the tiny checkpoint inside the package
>>> engine.describe("photo.jpg", [garserve.Region.from_box([10, 20, 200, 300])])
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from garserve.openmp import prefer_intel

__version__ = "0.1.0"

if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":
    logging.getLogger("vllm").setLevel(logging.ERROR)  # its processes speak before they have read this themselves

if TYPE_CHECKING:
    from garserve.answers import Answer as Answer
    from garserve.answers import Chunk as Chunk
    from garserve.chat import Chat as Chat
    from garserve.client import AsyncClient as AsyncClient
    from garserve.client import Client as Client
    from garserve.client_answers import RegionText as RegionText
    from garserve.client_answers import ServerError as ServerError
    from garserve.engine import Engine as Engine
    from garserve.engine import load as load
    from garserve.errors import CheckpointError as CheckpointError
    from garserve.errors import GarserveError as GarserveError
    from garserve.errors import InputError as InputError
    from garserve.errors import OnnxError as OnnxError
    from garserve.errors import RegionError as RegionError
    from garserve.errors import RequestError as RequestError
    from garserve.inputs.encoded import EncodedImage as EncodedImage
    from garserve.inputs.regions import Region as Region
    from garserve.inputs.request import RegionRequest as RegionRequest
    from garserve.inputs.request import Turn as Turn

_HOMES = {
    "Answer": "answers",
    "Chat": "chat",
    "Chunk": "answers",
    "Client": "client",
    "AsyncClient": "client",
    "RegionText": "client_answers",
    "ServerError": "client_answers",
    "Engine": "engine",
    "load": "engine",
    "CheckpointError": "errors",
    "GarserveError": "errors",
    "EncodedImage": "inputs.encoded",
    "InputError": "errors",
    "OnnxError": "errors",
    "RegionError": "errors",
    "RequestError": "errors",
    "Region": "inputs.regions",
    "RegionRequest": "inputs.request",
    "Turn": "inputs.request",
}
_NEED_TORCH = ("chat", "engine", "inputs.encoded", "inputs.request")
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    # Names are fetched when they are used: torch and vllm take seconds to import, `import garserve` does not.
    if name in _HOMES:
        if _HOMES[name] in _NEED_TORCH:
            prefer_intel()
        return getattr(import_module(f"garserve.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'garserve' has no attribute {name!r}")
