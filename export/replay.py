"""`garserve export replay`: RoI replay as a graph of standard ONNX operators."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from garserve.export.vision import writing

from garserve.checkpoint import Checkpoint
from garserve.config import BoxScale, GARConfig
from garserve.errors import RequestError
from garserve.model.fingerprint import vision_fingerprint, vision_settings
from garserve.model.onnx_file import REPLAY, ModelInfo, require

OPSET = 20  # ONNX Runtime's RoiAlign is that of opset 16; the one of opset 22 has no implementation there
TOLERANCE = 1e-4

# `half_pixel` is torchvision's aligned=True: positions move by half a cell. `released` boxes are scaled once more, as
# the authors' code does inside its roi_align (garserve.inputs.roi).
_GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}]>
replay (float[T, {cells}, {width}] features, float[R, 4] boxes, int64[2] grid) => (float[R, {cells}, {width}] tokens)
<float factor = {{{factor}}}, int64[1] ones = {{1}}, int64[1] width = {{{width}}}, int64[1] sides = {{{side}}},
 int64[1] cells = {{{cells}}}, int64[2] flip = {{1, 0}}>
{{
    down_across = Gather (grid, flip)
    down, across = Split <axis = 0, num_outputs = 2> (down_across)
    tiled = Concat <axis = 0> (down, across, sides, sides, width)
    by_tile = Reshape (features, tiled)
    by_row = Transpose <perm = [4, 0, 2, 1, 3]> (by_tile)
    lengths = Mul (down_across, sides)
    mapped = Concat <axis = 0> (ones, width, lengths)
    map = Reshape (by_row, mapped)

    reach = Mul (grid, sides)
    corner = Cast <to = 1> (reach)
    corners = Concat <axis = 0> (corner, corner)
    scaled = Mul (boxes, corners)
    rois = Mul (scaled, factor)
    shape = Shape <start = 0, end = 1> (boxes)
    batch = ConstantOfShape <value = int64[1] {{0}}> (shape)
    aligned = RoiAlign <coordinate_transformation_mode = "half_pixel", mode = "avg", output_height = {side},
        output_width = {side}, sampling_ratio = 2, spatial_scale = 1.0> (map, rois, batch)
    rows = Concat <axis = 0> (shape, width, cells)
    channels = Reshape (aligned, rows)
    tokens = Transpose <perm = [0, 2, 1]> (channels)
}}
"""


def export_replay(checkpoint: Checkpoint, folder: Path, *, box_scale: BoxScale | None = None) -> ModelInfo:
    """Write `replay.onnx` into `folder`, and return what it says of itself.

    Inputs: `features` float32 [T, n², C] of an image's tiles, row by row and without the thumbnail, `boxes` float32
    [R, 4], x1, y1, x2, y2 normalised to 0..1, and `grid` int64 [2], tiles across and down. Output: `tokens` float32
    [R, n², C]. `box_scale` is the checkpoint's own by default.
    Raises RequestError for an unknown scale, OnnxError where a package is missing or the folder cannot be written.
    """
    if box_scale not in (None, *get_args(BoxScale)):
        raise RequestError(f"box_scale: expected {' or '.join(get_args(BoxScale))}, got {box_scale!r:.80}")
    config = checkpoint.config.with_box_scale(box_scale or checkpoint.config.replay_box_scale)
    info = ModelInfo(
        kind=REPLAY,
        version=version("garserve"),
        checkpoint=vision_fingerprint(checkpoint),
        dtype="fp32",
        opset=OPSET,
        tolerance=TOLERANCE,
        config={**vision_settings(config), "box_scale": config.replay_box_scale},
    )
    onnx: Any = require("onnx")
    model = replay_model(config)
    onnx.helper.set_model_props(model, info.as_properties())
    onnx.checker.check_model(model, full_check=True)
    path = folder / f"{REPLAY}.onnx"
    partial = path.with_suffix(".partial")
    with writing(folder):
        onnx.save_model(model, str(partial))
        partial.replace(path)
    return info


def replay_model(config: GARConfig) -> Any:
    """Return the graph, an `onnx.ModelProto`, for a checkpoint's shapes and its definition of the box."""
    side, released = config.tokens_per_side, config.replay_box_scale == "released"
    factor = 1.0 / (config.vision.patch_size * config.pooling) if released else 1.0
    text = _GRAPH.format(opset=OPSET, side=side, cells=side**2, width=config.hidden_size, factor=repr(float(factor)))
    return require("onnx.parser").parse_model(text)
