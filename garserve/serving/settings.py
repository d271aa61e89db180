"""What an operator decides: who may ask, how much, and how long (everything picklable, for several API processes)."""

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from garserve.errors import RequestError

KEY_VARIABLES = ("GARSERVE_API_KEY", "VLLM_API_KEY")
_PREFIX = "GARSERVE_SERVE_"
_MIB = 1024 * 1024
# What Kubernetes sets in every pod for a service that is called garserve-serve, and means no harm by.
_OF_A_CLUSTER = re.compile(r".*SERVICE_(HOST|PORT(_\w+)?)|.*PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True)
class Settings:
    """Limits and permissions of a server. A limit counts for each API process."""

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 * _MIB
    max_image_bytes: int = 20 * _MIB
    max_pixels: int = 50_000_000
    max_pixels_in_work: int = 1_000_000_000  # of all decoded images together, three bytes each; others wait
    max_regions: int = 256  # of a description; a chat takes as many as the checkpoint has prompts
    max_points: int = 10_000  # of one region: vertices of polygons, points, runs of an RLE are 32 times as many
    max_queue: int = 256  # requests in work or waiting
    max_text: int = 100_000  # characters of all messages together
    body_seconds: float = 30.0  # for a body to arrive
    send_seconds: float = 60.0  # for a client to take the next piece of its answer
    fetch_seconds: float = 10.0  # for an image to be fetched
    request_seconds: float = 300.0  # for an answer; 0 is no limit
    drain_seconds: float = 60.0  # for what runs when SIGTERM comes
    image_hosts: tuple[str, ...] = ()  # hosts of http(s) images; none: nothing is fetched
    image_folder: Path | None = None  # file:// images; None: none
    prepare_threads: int = 0  # 0: half of the cores, 2 to 8
    describe_in_flight: int = 16  # regions of one description in the engine at a time
    regions_in_flight: int = 512  # of all descriptions; each has its own copy of its image's tiles
    log_format: str = "json"

    @classmethod
    def from_environment(cls, *, given: Collection[str] = ()) -> "Settings":
        """Return the defaults, changed by GARSERVE_SERVE_<FIELD> variables; `given` fields have options of their own.

        The keys are those of GARSERVE_SERVE_API_KEYS and of `keys_of_environment` together; an empty variable of keys,
        or of the folder, says nothing. Raises RequestError for a value that its field cannot take, for a variable of a
        field that is `given`, and for a GARSERVE_SERVE_ variable that is no field's.
        """
        known = {_PREFIX + field.name.upper(): field for field in fields(cls)}
        _refuse_unknown(known)
        chosen: dict[str, Any] = {}
        for variable, field in known.items():
            text = os.environ.get(variable)
            if text is not None and field.name in given:
                raise RequestError(f"{variable}: has an option of garserve serve; use that")
            if text is not None:
                chosen[field.name] = _read(field.name, text, field.default)
        chosen["api_keys"] = tuple(dict.fromkeys((*chosen.get("api_keys", ()), *keys_of_environment())))
        return cls(**chosen)


def keys_of_environment() -> tuple[str, ...]:
    """Return the API keys of the environment, where a process list does not show them."""
    return tuple(key for name in KEY_VARIABLES if (key := os.environ.get(name, "").strip()))


def folder_of_images(text: str, given_as: str) -> Path:
    """Return a folder that file:// images may be read from. Raises RequestError, which names `given_as`, for another.

    An empty text is none: as a path it would be the working directory.
    """
    if not text.strip() or not Path(text).is_dir():
        raise RequestError(f"{given_as}: expected a folder, got {text!r:.80}")
    return Path(text)


def _refuse_unknown(known: Collection[str]) -> None:
    """Raise a RequestError for a variable of the server that it does not know: a misspelt key would leave it open."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(_PREFIX) and name not in known and not _is_of_a_cluster(name, value):
            fields_known = [variable.removeprefix(_PREFIX) for variable in known]
            near = difflib.get_close_matches(name.removeprefix(_PREFIX).upper(), fields_known, n=1)
            meant = f"did you mean {_PREFIX}{near[0]}?" if near else "the fields of garserve's Settings are all"
            raise RequestError(f"{name}: no variable of the server; {meant}")


def _is_of_a_cluster(name: str, value: str) -> bool:
    return bool(_OF_A_CLUSTER.fullmatch(name.removeprefix(_PREFIX)) or _ADDRESS.match(value))


def _read(name: str, text: str, default: Any) -> Any:
    if name in ("api_keys", "image_hosts"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "image_folder":
        return Path(text) if text.strip() else None
    kind = type(default)
    least = 1 if kind is int and default else 0
    try:
        value = kind(text)
    except ValueError:
        raise RequestError(f"{_PREFIX}{name.upper()}: expected {kind.__name__}, got {text!r:.80}") from None
    if kind in (int, float) and not value >= least:
        raise RequestError(f"{_PREFIX}{name.upper()}: expected at least {least}, got {text!r:.80}")
    return value
