"""An exported model as it lies on disk: what it says of itself, and whether all of it is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garserve.errors import OnnxError

VISION, REPLAY = "vision", "replay"
KINDS = (VISION, REPLAY)
_PREFIX = "garserve."


@dataclass(frozen=True)
class ModelInfo:
    """What an export writes into a model's `metadata_props`, each field under `garserve.<name>`."""

    kind: str  # "vision" or "replay"
    version: str  # of garserve
    checkpoint: str  # fingerprint of the vision half (garserve.model.fingerprint)
    dtype: str  # "fp32", "fp16", "bf16" or "int8"
    opset: int
    tolerance: float  # of the largest difference, relative to the largest value of the reference
    config: dict[str, Any]  # see garserve.model.fingerprint.vision_settings; a replay also has its box_scale

    @property
    def tower(self) -> str:
        """What tells a vision model's features from those of the tower in torch beyond rounding; "" where nothing does.

        "fp16", "bf16", "int8 dynamic"; of scales fixed by calibration, also what they cost, which tells them apart.
        """
        if self.dtype == "fp32":
            return ""
        activations = self.config.get("activations")
        error = self.config.get("calibration_errors", {}).get("static") if activations == "static" else None
        return " ".join(str(part) for part in (self.dtype, activations, error) if part is not None)

    def as_properties(self) -> dict[str, str]:
        """Return the fields as texts."""
        fields = {**vars(self), "config": json.dumps(self.config, sort_keys=True)}
        return {_PREFIX + name: str(value) for name, value in fields.items()}

    @classmethod
    def of(cls, properties: Mapping[str, str], path: Path) -> "ModelInfo":
        """Read the fields back. Raises OnnxError where one is missing or broken."""
        try:
            held = {name: properties[_PREFIX + name] for name in cls.__dataclass_fields__}
            numbers = {"opset": int(held["opset"]), "tolerance": float(held["tolerance"])}
            return cls(**{**held, **numbers, "config": json.loads(held["config"])})  # type: ignore[arg-type]
        except (KeyError, ValueError) as error:
            raise OnnxError(
                f"{path}: expected a model exported by garserve, got one whose metadata lack or garble {error}"
            ) from None


def model_path(given: Path, kind: str = VISION) -> Path:
    """Return the model's file, of an export's folder or of the file itself. Raises OnnxError where there is none."""
    path = given / f"{kind}.onnx" if given.is_dir() else given
    if not path.is_file():
        raise OnnxError(f"{path}: no such file; expected a model written by `garserve export {kind}`")
    return path


def read_info(path: Path, kind: str = VISION) -> ModelInfo:
    """Read what a model says of itself, and check that the file and its external data are whole; no weights are read.

    Raises OnnxError naming the file where it is missing, truncated, of another kind, or not garserve's.
    """
    onnx = require("onnx")
    path = model_path(path, kind)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own error, which is no public class
        raise OnnxError(f"{path}: not an ONNX model, or a truncated one ({type(error).__name__})") from None
    info = ModelInfo.of({entry.key: entry.value for entry in model.metadata_props}, path)
    if info.kind != kind:
        raise OnnxError(f"{path}: expected a {kind} model, got a {info.kind} model")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, {entry.key: entry.value for entry in tensor.external_data})
    return info


def _check_external(path: Path, entry: Mapping[str, str]) -> None:
    data = path.parent / entry["location"]
    if Path(entry["location"]).name != entry["location"]:
        raise OnnxError(f"{path}: external data {entry['location']!r}: expected a file beside the model")
    if not data.is_file():
        raise OnnxError(f"{path}: its external data file {data.name} is missing; expected it beside the model")
    end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
    if data.stat().st_size < end:
        raise OnnxError(f"{data}: truncated; expected at least {end} bytes, got {data.stat().st_size}")


def require(package: str) -> Any:
    """Import a package that only ONNX needs. Raises OnnxError saying how to install it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise OnnxError(f"{package} is not installed ({error}): pip install 'garserve[onnx]'") from None
