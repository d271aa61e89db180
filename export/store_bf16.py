"""Weights in bfloat16, sums in float32: half the file.

Weights that are bfloat16 in the checkpoint are stored as they are, but for those that `tower_graph` computes: layer
scales go into the layers before them, and the mask's three channels are one.
"""

from typing import Any

import torch

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_FACTORS = 2  # their first inputs; what comes behind them is a bias


def store_bf16(model: Any) -> None:
    """Replace each float32 matrix of weights of an `onnx_ir.Model` by bfloat16 values and a Cast, which runtimes fold.

    Biases, norms, positions, rotary tables and the scale of pixels stay float32: they are small, and read by all tiles.
    """
    import onnx_ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.dtype != onnx_ir.DataType.FLOAT or not _is_weight(value):
            continue
        rounded = torch.from_numpy(value.const_value.numpy().copy()).to(torch.bfloat16)
        stored = onnx_ir.Value(
            name=f"{name}.bf16", shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.BFLOAT16)
        )
        stored.const_value = onnx_ir.Tensor(
            rounded.view(torch.uint16).numpy(), dtype=onnx_ir.DataType.BFLOAT16, shape=value.shape, name=stored.name
        )
        cast = onnx_ir.node("Cast", [stored], {"to": int(onnx_ir.DataType.FLOAT)})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        graph.initializers.pop(name)
        graph.initializers.add(stored)
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _is_weight(value: Any) -> bool:
    """Whether an `onnx_ir.Value` is read as a factor of products alone, as it is or transposed."""
    return bool(value.uses()) and all(
        _is_weight(node.outputs[0]) if node.op_type == "Transpose" else node.op_type in _PRODUCTS and place < _FACTORS
        for node, place in value.uses()
    )
