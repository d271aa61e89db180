"""`garserve export vision`: a checkpoint's vision half as one ONNX graph of uint8 tiles and masks."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from garserve.export.quiet import quiet
from garserve.export.samples import Tiles, random_tiles, relative_error
from garserve.export.source import load_encoder
from garserve.export.tower_graph import FUSED_OPSET, TowerGraph

from garserve.checkpoint import Checkpoint
from garserve.config.files import reason
from garserve.errors import OnnxError, RequestError
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import vision_fingerprint, vision_settings
from garserve.model.onnx_file import VISION, ModelInfo, require
from garserve.model.onnx_vision import OnnxVision

Dtype = Literal["fp32", "fp16", "bf16", "int8"]

# Largest difference from the reference in float32, relative to its largest value.
TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 5e-2}
OPSETS = (18, 19, 20, 21, 22, 23)
FILE = f"{VISION}.onnx"
_TRACED_TILES = 2  # any number but 1, which torch.export takes for a constant


@dataclass(frozen=True)
class Exported:
    """What an export gave: the model's description, its error against the reference on random tiles, its fusions."""

    info: ModelInfo
    error: float
    fused: dict[str, int]  # operators that ONNX Runtime's optimizer put in, and how many of each


def export_vision(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: Dtype = "fp32",
    opset: int = FUSED_OPSET,
    calibration: Sequence[Tiles] = (),
    fuse: bool = False,
) -> Exported:
    """Write `vision.onnx` and its weights, `vision.onnx.data`, into `folder`, and check them.

    Inputs `tiles` uint8 [T, 3, S, S] and `masks` uint8 [T, S, S] (0 is unmarked), output `features` float32
    [T, n², C], for any T. "fp16" computes in float16; "bf16" keeps the weights in bfloat16 and computes in float32,
    which every execution provider does; "int8" has weights of 8 bits, and activations as `garserve.export.quantise`
    chooses with `calibration`. At opset 23 attention is one operator; below, it is spelled out for runtimes that do
    not know that one. `fuse` lets ONNX Runtime's transformer optimizer put in operators of its own, which other
    runtimes do not have.
    Raises RequestError for another dtype or opset, OnnxError where a package is missing, where the folder cannot be
    written, or where the model that came out is not within its tolerance of the reference.
    """
    if dtype not in get_args(Dtype):
        raise RequestError(f"dtype: expected {', '.join(get_args(Dtype))}, got {dtype!r:.80}")
    if opset not in OPSETS:
        raise RequestError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset!r:.80}")
    if calibration and dtype != "int8":
        raise RequestError(f"calibration: only int8 is calibrated, got dtype {dtype}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    encoder = load_encoder(checkpoint)
    info = ModelInfo(
        kind=VISION,
        version=version("garserve"),
        checkpoint=vision_fingerprint(checkpoint),
        dtype=dtype,
        opset=opset,
        tolerance=TOLERANCES[dtype],
        config=vision_settings(checkpoint.config),
    )
    with writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
        path = Path(made) / FILE
        write_graph(encoder, path, info)
        if dtype == "int8":
            from garserve.export.quantise import quantise

            info = quantise(path, info, calibration)
        fused: dict[str, int] = {}
        if fuse:
            from garserve.export.fuse import fuse_operators

            fused = fuse_operators(path)
        error = _check(encoder, path)
        _move(Path(made), folder)
    return Exported(info, error, fused)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and raise OnnxError that names it where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: torch raises some of its own
            raise
        raise OnnxError(f"{folder}: cannot be written ({reason(error)})") from error


def _check(encoder: RegionEncoder, path: Path) -> float:
    """Compare what was written with the reference, before it takes its place."""
    onnx, tiles = require("onnx"), random_tiles(encoder.config, _TRACED_TILES + 1, seed=1)
    onnx.checker.check_model(str(path), full_check=True)
    session = OnnxVision(path, provider="cpu")
    error = relative_error(session.run(tiles.tiles, tiles.masks), tiles.features(encoder))
    if not error <= session.info.tolerance:
        raise OnnxError(
            f"exported vision model: expected within {session.info.tolerance:g} of the reference, got {error:.1e}"
        )
    return error


def write_graph(encoder: RegionEncoder, path: Path, info: ModelInfo) -> None:
    """Trace an encoder's graph in the dtype and opset of `info`, and write it with its weights beside `path`."""
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    graph = TowerGraph(encoder, fused=info.opset >= FUSED_OPSET).eval()
    if info.dtype == "fp16":
        graph.half()
    tiles = random_tiles(encoder.config, _TRACED_TILES)
    count = torch.export.Dim("T", min=1, max=2**20)
    with quiet():
        program = torch.onnx.export(
            graph,
            (tiles.tiles, tiles.masks),
            input_names=["tiles", "masks"],
            output_names=["features"],
            dynamo=True,
            opset_version=info.opset,
            dynamic_shapes={"tiles": {0: count}, "masks": {0: count}},
            verbose=False,
        )
    if program is None:
        raise OnnxError("torch.onnx.export gave no program")
    model: Any = program.model
    for node in model.graph.all_nodes():  # where in the source a node comes from: paths of this machine
        node.metadata_props.clear()
        node.doc_string = None
    if info.dtype == "bf16":
        from garserve.export.store_bf16 import store_bf16

        store_bf16(model)
    model.metadata_props.clear()
    model.metadata_props.update(info.as_properties())
    onnx_ir.save(model, path, external_data=path.name + ".data")


def _move(made: Path, folder: Path) -> None:
    """Put the files in place, the model last: whoever finds it finds its weights, and never another model's."""
    (folder / FILE).unlink(missing_ok=True)
    for name in sorted(os.listdir(made), key=lambda name: name == FILE):
        shutil.copymode(made / FILE, made / name)  # onnx makes data files that only their owner may read
        shutil.move(made / name, folder / name)
