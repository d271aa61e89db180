"""ONNX Runtime's transformer optimizer: operators of its own in the place of standard ones, where it finds them."""

from collections import Counter
from pathlib import Path

from garserve.export.quiet import quiet

from garserve.model.onnx_file import require

_DOMAIN = "com.microsoft"


def fuse_operators(path: Path) -> dict[str, int]:
    """Optimise the model at `path` in its place, and return how many of which of ONNX Runtime's own operators it got.

    On the graphs that garserve exports, attention, rotary positions and norms are single operators already; what is
    left to find is the bias before each GELU.
    """
    require("onnxruntime")
    from onnxruntime.transformers.optimizer import optimize_model

    with quiet():
        optimised = optimize_model(str(path), model_type="vit", opt_level=0)
    data = path.with_name(path.name + ".data")
    path.unlink()
    data.unlink(missing_ok=True)
    onnx = require("onnx")
    if all(entry.domain != _DOMAIN for entry in optimised.model.opset_import):
        optimised.model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    onnx.save_model(optimised.model, str(path), save_as_external_data=True, location=data.name, size_threshold=256)
    return dict(Counter(node.op_type for node in optimised.model.graph.node if node.domain == _DOMAIN))
