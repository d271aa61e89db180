"""Weights in bfloat16, sums in float32: half the file, and nothing lost where the checkpoint itself is bfloat16."""

from typing import Any

import torch

_SMALLEST = 2  # dimensions; biases, norms and tables stay float32


def store_bf16(model: Any) -> None:
    """Replace each float32 matrix of an `onnx_ir.Model` by bfloat16 values and a Cast, which runtimes fold."""
    import onnx_ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.dtype != onnx_ir.DataType.FLOAT or len(value.shape) < _SMALLEST:
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
