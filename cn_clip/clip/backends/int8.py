"""Matrix products in int8, for ONNX Runtime and for OpenVINO; products that lose too much are found and left out."""

# N rows of a product's input, K its columns, M columns of the weight

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends import parity
from cn_clip.clip.backends.base import Kind
from cn_clip.clip.backends.onnx_files import INPUTS, load, save
from cn_clip.clip.backends.parity import Reference, Share
from cn_clip.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto

# The smallest cosine to float32 that is good enough; below it, products are left out. The export fails further down.
TARGET = 0.995
# Largest weight in int8. Processors without VNNI add two products in 16 bits, which 127 may overflow and 63 may not.
LEVELS = (127, 63)
# Matrices with fewer rows or columns than this stay float32: their cost is nothing, their error is not averaged out.
SMALLEST_SIDE = 64
# Inputs that the loss of each product is measured on.
NUM_MEASURED = 4


@dataclass(frozen=True)
class Choice:
    """How a file is quantised. levels: the largest weight in int8. left_out: products that stay float32."""

    levels: int
    left_out: tuple[str, ...]


def choose(base: Path, kind: Kind, form: str, path: Path, reference: Reference) -> Choice:
    """The choice that gives the products of a float32 file in int8.

    form: "int8" (activations become int8 in the graph) or "int8.openvino" (by themselves, in OpenVINO). All products
    are int8 if that is within TARGET of the reference; otherwise the worst are left out, up to half of them.
    path: where attempts are written.
    """
    found = []
    for levels, left_out in _attempts(base, kind, reference, path):
        choice = Choice(levels, tuple(left_out))
        save(quantised(base, form, choice), path)
        smallest = float(parity.cosines(reference, path, kind, form).min())
        if smallest >= TARGET:
            return choice
        found.append((smallest, levels, left_out))
    _, levels, left_out = max(found)
    return Choice(levels, tuple(left_out))


def _attempts(base: Path, kind: Kind, reference: Reference, scratch: Path) -> Iterator[tuple[int, list[str]]]:
    for levels in LEVELS:
        yield levels, []
    losses = product_losses(base, kind, reference, scratch)
    worst_first = sorted(losses, key=lambda name: losses[name], reverse=True)
    number = 1
    while number <= len(worst_first) // 2:
        for levels in LEVELS:
            yield levels, worst_first[:number]
        number *= 2


def quantised(base: Path, form: str, choice: Choice) -> "ModelProto":
    """The model of a float32 file with int8 products."""
    onnx: Any = require("onnx", extra="onnx", purpose="int8 export")
    proto = load(base)
    graph = proto.graph
    products = {name: weight for name, weight in _products(proto).items() if name not in choice.left_out}
    known: dict[str, Any] = {}
    nodes: list[Any] = []
    for node in graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        weight = node.input[1]
        if f"{weight}_int8" not in known:
            rounded_KM, scale_M = rounded(products[node.name], choice.levels)
            for name, values in ((f"{weight}_int8", rounded_KM), (f"{weight}_scale", scale_M)):
                known[name] = onnx.numpy_helper.from_array(values, name)
        nodes += (_integer_product if form == "int8" else _dequantised_product)(onnx, node, nodes)
    used = {name for node in nodes for name in node.input}
    kept = [one for one in [*graph.initializer, *known.values()] if one.name in used]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return proto


def _integer_product(onnx: Any, node: Any, before: list[Any]) -> list[Any]:
    """The product of integers, as ONNX Runtime knows to fuse it; equal inputs are quantised once."""
    (x, weight), product = node.input, node.output[0]
    parts = [f"{x}_uint8", f"{x}_scale", f"{x}_zero"]
    make = onnx.helper.make_node
    quantise = make("DynamicQuantizeLinear", [x], parts, name=f"{x}_quantise")
    return [
        *([] if any(one.name == quantise.name for one in before) else [quantise]),
        make("MatMulInteger", [parts[0], f"{weight}_int8", parts[2]], [f"{product}_int32"], name=f"{node.name}_int32"),
        make("Cast", [f"{product}_int32"], [f"{product}_cast"], name=f"{node.name}_cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [parts[1], f"{weight}_scale"], [f"{product}_scales"], name=f"{node.name}_scales"),
        make("Mul", [f"{product}_cast", f"{product}_scales"], [product], name=node.name),
    ]


def _dequantised_product(onnx: Any, node: Any, before: list[Any]) -> list[Any]:
    """A product with weights that are int8 in the file: OpenVINO multiplies them as such where it may."""
    weight = node.input[1]
    parts, full = [f"{weight}_int8", f"{weight}_scale"], f"{weight}_float"
    dequantise = onnx.helper.make_node("DequantizeLinear", parts, [full], name=full, axis=1)
    node.input[1] = full
    return [*([] if any(one.name == full for one in before) else [dequantise]), node]


def rounded(weight_KM: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8 weights, the scale of each column): their product is the weight, but for rounding."""
    scale_M = np.abs(weight_KM).max(axis=0) / np.float32(levels)
    scale_M[scale_M == 0] = 1
    return np.round(weight_KM / scale_M).astype(np.int8), scale_M


def _products(proto: "ModelProto") -> Mapping[str, NDArray[np.float32]]:
    """The weights (K, M) of the products that may become int8, by the name of the product."""
    onnx: Any = require("onnx", extra="onnx", purpose="int8 export")
    return {
        name: onnx.numpy_helper.to_array(weight) for name, weight in _weights(proto).items() if _may_be_int8(weight)
    }


def _weights(proto: "ModelProto", operations: Collection[str] = ("MatMul",)) -> dict[str, Any]:
    """The constant second factors of operations, by the name of the operation."""
    initializers = {one.name: one for one in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in operations and node.input[1] in initializers]
    return {node.name: initializers[node.input[1]] for node in nodes}


def _may_be_int8(weight: Any) -> bool:
    return len(weight.dims) == 2 and min(weight.dims) >= SMALLEST_SIDE


def share(base: Path, left_out: Collection[str]) -> Share:
    """How much of a float32 file becomes int8. Convolutions count, and stay float32."""
    onnx: Any = require("onnx", extra="onnx", purpose="int8 export")
    proto = onnx.shape_inference.infer_shapes(load(base, with_weights=False))
    shapes = {one.name: one.type.tensor_type.shape.dim for one in [*proto.graph.value_info, *proto.graph.output]}
    work = {}
    for name, weight in _weights(proto, ("MatMul", "Gemm", "Conv")).items():
        (node,) = (node for node in proto.graph.node if node.name == name)
        sizes = [dim.dim_value or 1 for dim in shapes.get(node.output[0], ())]  # batch and text length are free
        places = sizes[2:] if node.op_type == "Conv" else sizes[:-1]
        work[name] = int(np.prod(weight.dims)) * int(np.prod(places))
    chosen = [name for name, weight in _weights(proto).items() if _may_be_int8(weight) and name not in left_out]
    return Share(len(chosen), len(work), sum(work[name] for name in chosen) / max(sum(work.values()), 1))


def product_losses(base: Path, kind: Kind, reference: Reference, scratch: Path) -> dict[str, float]:
    """The share of its output's energy that each product loses in int8, alone, on its own real inputs.

    scratch: where a copy is written whose outputs are those inputs.
    """
    onnx: Any = require("onnx", extra="onnx", purpose="int8 export")
    runtime: Any = require("onnxruntime", extra="onnx", purpose="int8 export")
    proto = load(base)
    products = _products(proto)
    sources = {node.name: node.input[0] for node in proto.graph.node if node.name in products}
    names = sorted(set(sources.values()))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, None) for one in names)
    save(proto, scratch)
    session = runtime.InferenceSession(str(scratch), providers=["CPUExecutionProvider"])
    values = session.run(names, {INPUTS[kind]: reference.inputs[kind][:NUM_MEASURED]})
    activations = dict(zip(names, values, strict=True))
    return {name: loss(activations[sources[name]], weight) for name, weight in products.items()}


def loss(x: NDArray[np.float32], weight_KM: NDArray[np.float32]) -> float:
    """|quantised product - product|^2 / |product|^2, x (…, K) in 256 steps from its smallest to its largest value."""
    x_NK = x.reshape(-1, x.shape[-1])
    step = np.float32(max(x_NK.max(), 0) - min(x_NK.min(), 0)) / 255 or np.float32(1)
    rounded_KM, scale_M = rounded(weight_KM, LEVELS[0])
    exact_NM = x_NK @ weight_KM
    lost_NM = (np.round(x_NK / step) * step) @ (rounded_KM * scale_M) - exact_NM
    return float((lost_NM**2).sum() / max((exact_NM**2).sum(), np.finfo(np.float32).tiny))
