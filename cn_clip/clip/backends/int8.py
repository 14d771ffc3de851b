"""Matrix products in int8: for ONNX Runtime with its own quantiser, for OpenVINO as int8 weights."""

from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.clip.backends.base import Kind
from cn_clip.extras import require

# Matrices with fewer rows than this stay float32: their cost is nothing, and their error is not averaged out.
SMALLEST_SIDE = 64


def for_onnx_runtime(base: Path, kind: Kind, path: Path) -> None:
    """Weights int8 per output channel; activations are quantised as they come. Sensitive products stay float32."""
    quantization: Any = require("onnxruntime.quantization", extra="onnx", purpose="int8 export")
    quantization.quantize_dynamic(
        base,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def for_openvino(base: Path, path: Path) -> None:
    """Weights int8 per output channel, dequantised in the graph: OpenVINO multiplies them as int8 when it may."""
    onnx: Any = require("onnx", extra="onnx", purpose="int8 export")
    from cn_clip.clip.backends.export import save

    proto = onnx.load(str(base))
    graph = proto.graph
    weights = {one.name: one for one in graph.initializer}
    dequantisers: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        name = node.input[1]
        if name not in dequantisers:
            values = onnx.numpy_helper.to_array(weights[name])
            if values.ndim != 2 or min(values.shape) < SMALLEST_SIDE:
                continue
            scale = np.abs(values).max(axis=0) / 127
            scale[scale == 0] = 1
            rounded = np.round(values / scale).astype(np.int8)
            parts = [f"{name}_int8", f"{name}_scale"]
            graph.initializer.extend(
                [onnx.numpy_helper.from_array(rounded, parts[0]), onnx.numpy_helper.from_array(scale, parts[1])]
            )
            dequantisers[name] = onnx.helper.make_node("DequantizeLinear", parts, [f"{name}_float"], axis=1)
        node.input[1] = f"{name}_float"
    used = {name for node in [*graph.node, *dequantisers.values()] for name in node.input}
    kept = [one for one in graph.initializer if one.name in used]
    nodes = [*dequantisers.values(), *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    save(onnx, proto, path)
