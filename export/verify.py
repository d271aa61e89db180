"""`garserve export verify`: an export against its checkpoint, in order: names, axes, shapes, values."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from garserve.export.samples import Tiles, photo_tiles, random_tiles, relative_error
from garserve.export.source import load_encoder

from garserve.checkpoint import Checkpoint
from garserve.errors import OnnxError, first_line
from garserve.inputs.roi import replay_roi
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import vision_fingerprint
from garserve.model.onnx_file import KINDS, REPLAY, VISION, ModelInfo, read_info, require
from garserve.model.onnx_vision import OnnxVision
from garserve.model.replay import replay

COUNTS = (1, 2, 5)  # tiles, or regions, that one session is asked for
_GRIDS = ((1, 1), (3, 2), (1, 4))
_REPLAY_PROVIDERS = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Check:
    """One check of one model. Errors are None where nothing is measured."""

    model: str
    provider: str
    check: str
    passed: bool
    note: str = ""
    largest: float | None = None  # difference
    relative: float | None = None  # to the reference's largest value
    limit: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the check as JSON data."""
        return asdict(self)


def verify(folder: Path, checkpoint: Checkpoint, *, providers: list[str] | None = None) -> Iterator[Check]:
    """Check every model in an export's folder on every execution provider of this machine, or on those named.

    Each model's checks stop at its first that fails: values of a model with other names say nothing.
    Raises OnnxError where there is no model, or one that is damaged or of another checkpoint.
    """
    found = [kind for kind in KINDS if (folder / f"{kind}.onnx").is_file()]
    if not found:
        raise OnnxError(f"{folder}: expected {' or '.join(f'{kind}.onnx' for kind in KINDS)}, got neither")
    fingerprint, encoder = vision_fingerprint(checkpoint), load_encoder(checkpoint)
    for kind in found:
        info = read_info(folder, kind)
        if info.checkpoint != fingerprint:
            raise OnnxError(
                f"{folder / kind}.onnx: exported from another checkpoint: expected {fingerprint}, got {info.checkpoint}"
            )
        sound = True
        for one in _until_failed(_structure(folder / f"{kind}.onnx", info, checkpoint)):
            sound = one.passed
            yield one
        for name in (providers or _present(kind)) if sound else ():
            check = _vision_values if kind == VISION else _replay_values
            yield from _until_failed(check(folder, info, encoder, name))


def _until_failed(checks: Iterator[Check]) -> Iterator[Check]:
    for check in checks:
        yield check
        if not check.passed:
            return


def _present(kind: str) -> list[str]:
    available = require("onnxruntime").get_available_providers()
    return [name for name in available if name != "AzureExecutionProvider"] if kind == VISION else [*_REPLAY_PROVIDERS]


def _structure(path: Path, info: ModelInfo, checkpoint: Checkpoint) -> Iterator[Check]:
    onnx = require("onnx")
    model = onnx.load(str(path), load_external_data=False)
    config = checkpoint.config
    side, cells, width = config.tile_size, config.tokens_per_tile, config.hidden_size
    wanted: dict[str, list[Any]] = (
        {"tiles": ["UINT8", 3, side, side], "masks": ["UINT8", side, side], "features": ["FLOAT", cells, width]}
        if info.kind == VISION
        else {
            "features": ["FLOAT", cells, width],
            "boxes": ["FLOAT", 4],
            "grid": ["INT64"],
            "tokens": ["FLOAT", cells, width],
        }
    )
    values = [*model.graph.input, *model.graph.output]
    names = [value.name for value in values]
    yield Check(info.kind, "", "names", names == list(wanted), ", ".join(names))
    axes = {value.name: _axes(value) for value in values}
    free = {name: [axis for axis in shape if isinstance(axis, str)] for name, shape in axes.items()}
    dynamic = all(len(free[name]) == (name != "grid") and isinstance(axes[name][0], str | int) for name in wanted)
    yield Check(
        info.kind, "", "dynamic axes", dynamic, ", ".join(f"{name}: {one[0]}" for name, one in free.items() if one)
    )
    kinds = {value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
    came = {name: [kinds[name], *axes[name][1:]] for name in wanted}
    yield Check(info.kind, "", "dtypes and shapes", came == wanted, "" if came == wanted else f"{came}, not {wanted}")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        yield Check(info.kind, "", "checker and shape inference", True, f"opset {info.opset}")
    except Exception as error:  # several classes of onnx's own
        yield Check(info.kind, "", "checker and shape inference", False, first_line(error))


def _axes(value: Any) -> list[int | str]:
    """Sizes of a tensor's axes; a name where the axis is free."""
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _vision_values(folder: Path, info: ModelInfo, encoder: RegionEncoder, provider: str) -> Iterator[Check]:
    try:
        session = OnnxVision(folder, provider=provider)
    except OnnxError as error:
        yield Check(VISION, provider, "session", False, str(error))
        return
    for count in COUNTS:
        sample = random_tiles(encoder.config, count, seed=count)
        yield _compared(info, provider, f"values, {count} random tiles", sample, encoder, session.run)
    for sample in photo_tiles(encoder.config):
        few = sample.first(max(COUNTS))
        yield _compared(info, provider, f"values, {len(few.tiles)} tiles of a photograph", few, encoder, session.run)


def _compared(
    info: ModelInfo,
    provider: str,
    name: str,
    sample: Tiles,
    encoder: RegionEncoder,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Check:
    return _difference(info, provider, name, run(sample.tiles, sample.masks).cpu(), sample.features(encoder))


def _difference(info: ModelInfo, provider: str, name: str, ours: torch.Tensor, wanted: torch.Tensor) -> Check:
    relative = relative_error(ours, wanted)
    largest = float((ours - wanted).abs().max()) if ours.shape == wanted.shape else float("inf")
    return Check(info.kind, provider, name, relative <= info.tolerance, info.dtype, largest, relative, info.tolerance)


def _replay_values(folder: Path, info: ModelInfo, encoder: RegionEncoder, provider: str) -> Iterator[Check]:
    runtime = require("onnxruntime")
    try:
        session = runtime.InferenceSession(str(folder / f"{REPLAY}.onnx"), providers=[provider])
    except Exception as error:  # pybind's classes of ONNX Runtime's error codes
        yield Check(REPLAY, provider, "session", False, first_line(error))
        return
    if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU in silence
        started = ", ".join(session.get_providers())
        yield Check(REPLAY, provider, "session", False, f"{provider} is installed but does not start here: {started}")
        return
    config = encoder.config.with_box_scale(info.config["box_scale"])
    side, generator = config.tokens_per_side, torch.Generator().manual_seed(0)
    for grid, count in zip(_GRIDS, COUNTS, strict=True):
        features = torch.randn(grid[0] * grid[1], side**2, config.hidden_size, generator=generator)
        boxes = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1)
        feeds = {"features": features.numpy(), "boxes": boxes.numpy(), "grid": np.array(grid)}
        ours = torch.from_numpy(session.run(None, feeds)[0])
        rois = [replay_roi(tuple(box), grid, config) for box in boxes.double().tolist()]
        rows = [replay(features[[place - 1 for place in roi.window.tile_indices(grid)]], roi, side) for roi in rois]
        name = f"values, {count} regions of {grid[0]} x {grid[1]} tiles, {config.replay_box_scale}"
        yield _difference(info, provider, name, ours, torch.stack(rows))
