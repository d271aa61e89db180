"""Which vision half an engine uses: the checkpoint's own in torch, or an exported one in ONNX Runtime."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from garserve.checkpoint import Checkpoint
from garserve.config.files import reason
from garserve.errors import OnnxError, RequestError
from garserve.model.fingerprint import vision_fingerprint

if TYPE_CHECKING:
    from garserve.model.onnx_vision import OnnxVision

Choice = tuple[Path, str | None]  # the model's file and the execution provider; None leaves it to the machine

CACHE = "GARSERVE_CACHE"
_DTYPES = {"half": "float16", "float": "float32"} | {name: name for name in ("float32", "bfloat16", "float16")}
_log = logging.getLogger("garserve")
_GPU_PROVIDERS = ("CUDA", "Tensorrt")  # how ONNX Runtime's names of them begin
_LAYOUT = 1  # of the exported graph; another one makes new files


def choose_vision(
    checkpoint: Checkpoint,
    vision_backend: str | None = None,
    vision_model: str | Path | None = None,
    *,
    dtype: object = "float32",
    device: Literal["cpu", "cuda"] | None = None,
) -> Choice | None:
    """Return the exported model to use and its execution provider, checked; None for the tower in torch.

    `vision_backend` is "torch", "onnx" or "onnx:PROVIDER"; None is "onnx" where a `vision_model` is named, and
    otherwise, for a large tower on a CPU, the faster of the two (`garserve.export.fastest`), where torch computes in
    `dtype` (a name, a torch.dtype, or "auto" for the checkpoint's own). Without a `vision_model`, a float32 export is
    made on first use, and kept in `cache_folder()` for the next. `device` is where tiles have to be computed; None
    leaves it to the machine.
    Raises RequestError for another name or a provider of another device, OnnxError where model or provider cannot be
    used for this checkpoint, or the cache cannot be written.
    """
    if not isinstance(vision_backend, str | None):
        raise RequestError(f"vision_backend: expected torch, onnx or onnx:PROVIDER, got {vision_backend!r:.80}")
    if not isinstance(vision_model, str | os.PathLike | None):
        raise RequestError(f"vision_model: expected a folder or a file of one, got {vision_model!r:.80}")
    if vision_backend is None and vision_model is None:
        return None if device == "cuda" else _fastest(checkpoint, dtype)  # on a GPU there is nothing to measure
    name, _, provider = (vision_backend or ("torch" if vision_model is None else "onnx")).partition(":")
    if name == "torch" and not provider:
        if vision_model is not None:
            raise RequestError("vision_model: expected vision_backend onnx, got torch")
        return None
    if name != "onnx" or (not provider and vision_backend is not None and ":" in vision_backend):
        raise RequestError(f"vision_backend: expected torch, onnx or onnx:PROVIDER, got {vision_backend!r:.80}")
    from garserve.model.onnx_file import model_path
    from garserve.model.onnx_vision import check_model, find_provider

    found = find_provider(provider or ("cpu" if device == "cpu" else None))
    place = "cuda" if found.startswith(_GPU_PROVIDERS) else "cpu"
    if device not in (None, place):
        raise RequestError(
            f"vision_backend: expected one that computes on {device}, got {found}, which does on {place}"
        )
    fingerprint = vision_fingerprint(checkpoint)
    path = Path(vision_model) if vision_model is not None else _kept_export(checkpoint, fingerprint)
    check_model(path, fingerprint)
    return model_path(path).resolve(), found


def open_vision(checkpoint: Checkpoint, choice: Choice) -> "OnnxVision":
    """Open a session on a chosen model. Raises OnnxError."""
    from garserve.model.onnx_vision import OnnxVision

    return OnnxVision(choice[0], provider=choice[1], fingerprint=vision_fingerprint(checkpoint))


def _fastest(checkpoint: Checkpoint, dtype: object) -> Choice | None:
    """Choose where nobody did. What cannot be exported stays in torch."""
    from garserve.export.fastest import may_measure, onnx_is_faster

    from garserve.model.onnx_file import model_path
    from garserve.model.onnx_vision import check_model, find_provider

    if not may_measure(checkpoint):
        return None
    name = str(dtype).removeprefix("torch.")
    name = _DTYPES.get(name, checkpoint.config.dtype)
    try:
        fingerprint = vision_fingerprint(checkpoint)
        exported = _kept_export(checkpoint, fingerprint)
        check_model(exported, fingerprint)
        if not onnx_is_faster(checkpoint, exported, name):
            return None
        return model_path(exported).resolve(), find_provider("cpu")
    except Exception as error:  # torch's, onnx's and ONNX Runtime's are of any kind, and nobody asked for an export
        _log.warning("the tower stays in torch: it could not be compared with an exported one (%s)", error)
        return None


def cache_folder() -> Path:
    """Return where exports are kept that were made on first use: $GARSERVE_CACHE, or garserve in the user's cache.

    Raises OnnxError where that is in the home of a user who has none.
    """
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get(CACHE) or Path(user) / "garserve")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise _unwritten(folder, error) from None


def _kept_export(checkpoint: Checkpoint, fingerprint: str) -> Path:
    from garserve.export.vision import export_vision

    folder = cache_folder() / "vision" / f"{fingerprint}-fp32-{_LAYOUT}"
    with suppress(OSError):  # a cache that may not be entered, of which the lock tells
        if (folder / "vision.onnx").is_file():  # also where the cache cannot be written
            return folder
    with _locked(folder):
        if not (folder / "vision.onnx").is_file():
            export_vision(checkpoint, folder)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock: whoever comes second finds what the first has made. Raises OnnxError."""
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _unwritten(folder, error) from error
        yield


def _unwritten(folder: Path, error: Exception) -> OnnxError:
    return OnnxError(f"{folder}: cannot be written ({reason(error)}); set {CACHE}, or name --vision-model")
