"""Signed weights of 7 bits, a scale for each output channel, and activations of 8 bits.

Weights are signed, which CPUs multiply fastest (VNNI's own form), and give up one bit: without it, CPUs with AVX2 but
without VNNI overflow their 16-bit sums, and features are off by a seventh of the largest value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from garserve.export.quiet import quiet
from garserve.export.samples import Tiles, relative_error

from garserve.model.onnx_file import ModelInfo, require

DYNAMIC, STATIC = "dynamic", "static"


def quantise(path: Path, info: ModelInfo, calibration: Sequence[Tiles] = ()) -> ModelInfo:
    """Replace the float32 model at `path` by one with its matrix products in 8 bits, and return its description.

    Activations are scaled by their range at run time ("dynamic"). With tiles to calibrate on, also by ranges seen
    there ("static"), and of the two the one is kept that is nearer to the float32 model on those tiles.
    """
    require("onnxruntime")
    whole = path.with_name("whole.onnx")
    _rename(path, whole)
    made = {DYNAMIC: _dynamic(whole, path.with_name("dynamic.onnx"))}
    errors: dict[str, float] = {}
    if calibration:
        made[STATIC] = _static(whole, path.with_name("static.onnx"), calibration)
        wanted = _run(whole, calibration)
        errors = {name: relative_error(_run(one, calibration), wanted) for name, one in made.items()}
    chosen = min(made, key=lambda name: errors.get(name, 0.0))
    info = replace(info, config={**info.config, "activations": chosen, "calibration_errors": errors})
    _rename(made[chosen], path, info.as_properties())
    for left in [whole, *made.values()]:
        left.unlink(missing_ok=True)
        left.with_name(left.name + ".data").unlink(missing_ok=True)
    return info


def _dynamic(source: Path, target: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    return target


def _static(source: Path, target: Path, calibration: Sequence[Tiles]) -> Path:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with quiet():
        quantize_static(
            source,
            target,
            _Reader(calibration),
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    return target


class _Reader:
    """Hands calibration tiles to ONNX Runtime, one at a time, so that all of their activations need not fit at once."""

    def __init__(self, calibration: Sequence[Tiles]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = (
            _feed(Tiles(one.tiles[i : i + 1], one.masks[i : i + 1]))
            for one in calibration
            for i in range(len(one.tiles))
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next inputs; None after the last."""
        return next(self._feeds, None)


def _feed(tiles: Tiles) -> dict[str, np.ndarray]:
    return {"tiles": tiles.tiles.numpy(), "masks": tiles.masks.numpy()}


def _run(path: Path, calibration: Sequence[Tiles]) -> torch.Tensor:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.concatenate([session.run(None, _feed(tiles))[0] for tiles in calibration]))


def _rename(source: Path, target: Path, properties: dict[str, str] | None = None) -> None:
    """Write a model and its external data under another name, with other properties where they are given."""
    onnx: Any = require("onnx")
    model = onnx.load(str(source))
    if properties is not None:
        onnx.helper.set_model_props(model, properties)
    onnx.save_model(model, str(target), save_as_external_data=True, location=target.name + ".data", size_threshold=256)
    source.unlink()
    source.with_name(source.name + ".data").unlink(missing_ok=True)
