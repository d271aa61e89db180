"""Exports that several tests look at, each made once."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from garserve.export.replay import export_replay
from garserve.export.source import load_encoder
from garserve.export.vision import export_vision

from garserve.checkpoint import TINY, Checkpoint
from garserve.model.encoder import RegionEncoder

_made: list[TemporaryDirectory[str]] = []  # they are removed when the tests end


def tiny_models(dtype: str = "fp32") -> Path:
    """A folder with the tiny checkpoint's models; the replay, too, beside the float32 one."""
    return _exported(dtype)


@cache
def _exported(dtype: str) -> Path:
    _made.append(TemporaryDirectory(prefix=f"garserve-{dtype}-"))
    folder = Path(_made[-1].name)
    export_vision(Checkpoint.open(TINY), folder, dtype=dtype)  # type: ignore[arg-type]
    if dtype == "fp32":
        export_replay(Checkpoint.open(TINY), folder)
    return folder


@cache
def tiny_encoder() -> RegionEncoder:
    """The reference that the tiny checkpoint's exports are held against."""
    return load_encoder(Checkpoint.open(TINY))
