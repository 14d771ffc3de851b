"""float16 for ONNX files: weights and arithmetic in half, inputs, outputs and normalisations in float32."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cn_clip.clip.backends.onnx_files import load
from cn_clip.errors import CheckpointError
from cn_clip.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

# Their sums leave the range of float16; the models compute them in float32 whatever the type of the weights.
FULL_PRECISION = ("LayerNormalization", "ReduceMean")


def halved(base: Path) -> "ModelProto":
    """The model of a float32 file with float16 inside; raises CheckpointError for a weight float16 cannot hold."""
    onnx: Any = require("onnx", extra="onnx", purpose="fp16 export")
    proto = load(base)
    graph = proto.graph
    for initializer in graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:
            initializer.CopyFrom(_half(onnx, initializer, base))
    nodes: list[Any] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == onnx.TensorProto.FLOAT:
                attribute.t.CopyFrom(_half(onnx, attribute.t, base))
        nodes += _in_float32(onnx, node) if node.op_type in FULL_PRECISION else [node]
    casts = _casts_of_ends(onnx, graph, nodes)
    del graph.node[:]
    graph.node.extend([*casts[0], *nodes, *casts[1]])
    return proto


def _half(onnx: Any, tensor: Any, base: Path) -> Any:
    values = onnx.numpy_helper.to_array(tensor)
    if not (np.abs(values) <= np.finfo(np.float16).max).all():
        raise CheckpointError(f"{tensor.name} holds values too large for float16; use fp32", at=base)
    return onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name)


def _in_float32(onnx: Any, node: Any) -> list[Any]:
    """The node between casts; whole-number inputs, the axes of a mean, are constants that stay as they are."""
    name, output = node.name, node.output[0]
    floats = range(len(node.input)) if node.op_type == "LayerNormalization" else range(1)
    casts = []
    for position in floats:
        full = f"{name}_input_{position}"
        casts.append(_cast(onnx, node.input[position], full, onnx.TensorProto.FLOAT))
        node.input[position] = full
    node.output[0] = f"{name}_output"
    return [*casts, node, _cast(onnx, node.output[0], output, onnx.TensorProto.FLOAT16)]


def _casts_of_ends(onnx: Any, graph: "GraphProto", nodes: list[Any]) -> tuple[list[Any], list[Any]]:
    """Casts behind the float inputs of the graph and before its float outputs, which `nodes` are led to."""
    renamed = {
        end.name: f"{end.name}_half"
        for end in [*graph.input, *graph.output]
        if end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    first = [
        _cast(onnx, end.name, renamed[end.name], onnx.TensorProto.FLOAT16) for end in graph.input if end.name in renamed
    ]
    last = [
        _cast(onnx, renamed[end.name], end.name, onnx.TensorProto.FLOAT) for end in graph.output if end.name in renamed
    ]
    return first, last


def _cast(onnx: Any, source: str, target: str, data_type: int) -> Any:
    return onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=data_type)
