"""Other precisions of a float32 ONNX file: float16, and matrix products in int8 for ONNX Runtime and for OpenVINO.

float16: weights and arithmetic in half, inputs, outputs and normalisations in float32. int8: products that lose too
much are found and left out. Each file is measured before it is believed. Needs no PyTorch.
"""

# N rows of a product's input, K its columns, M columns of the weight

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends import parity
from cn_clip.clip.backends.base import TowerFacts
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.backends.onnx_files import INPUTS, METADATA_KEY, load, metadata, read_metadata, save, set_metadata
from cn_clip.clip.backends.parity import Reference, Report, Share
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.extras import require
from cn_clip.language import both
from cn_clip.progress import working

if TYPE_CHECKING:
    from onnx import ModelProto

# The packages that writing and measuring a form takes, each with the extra that installs it.
PACKAGES = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
# Their sums leave the range of float16; the models compute them in float32 whatever the type of the weights.
FULL_PRECISION = ("LayerNormalization", "ReduceMean")
# The smallest cosine to float32 that is good enough; below it, products are left out. The export fails further down.
TARGET = 0.995
# Largest weight in int8. Processors without VNNI add two products in 16 bits, which 127 may overflow and 63 may not.
LEVELS = (127, 63)
# Matrices with fewer rows or columns than this stay float32: their cost is nothing, their error is not averaged out.
SMALLEST_SIDE = 64
# Inputs that the loss of each product is measured on.
NUM_MEASURED = 4


def check_packages(forms: Collection[str]) -> None:
    """Raises MissingExtraError for a package that exporting from PyTorch to these forms takes and that is absent."""
    for module, extra in PACKAGES.items():
        if module != "openvino" or "int8.openvino" in forms:
            require(module, extra=extra, purpose=f"exporting to ONNX ({', '.join(forms)})")


def derive(
    base: Path, kind: Kind, form: str, path: Path, expected: Reference, *, tolerance: float | None = None
) -> Report:
    """Writes another form of a float32 file: "fp16", "int8" or "int8.openvino"; returns how close it is.

    Needs no PyTorch. Raises CheckpointError when it is further from float32 than the tolerance of its form.
    """
    choice = part = None
    if form == "fp16":
        with working(both(f"转成 float16（{kind}）", f"converting to float16 ({kind})")):
            proto = halved(base)
    elif form in ("int8", "int8.openvino"):
        with working(both(f"量化到 int8（{kind}）", f"quantising to int8 ({kind})")):
            choice = choose(base, kind, form, path, expected)
            part = share(base, choice.left_out)
            proto = quantised(base, form, choice)
    else:
        raise ConfigError(f"form: expected fp16, int8 or int8.openvino, got {form!r}")
    text = {one.key: one.value for one in proto.metadata_props}.get(METADATA_KEY)
    known = read_metadata(str(base), kind, text)
    if "embed_dim" not in known:
        raise CheckpointError("was not written by this package; export the model again", at=base)
    facts = TowerFacts(**{**known, "kind": kind, "precision": form.partition(".")[0]})
    if choice is not None and part is not None:
        facts = replace(facts, left_out=choice.left_out, levels=choice.levels)
        facts = replace(facts, num_int8=part.num_int8, num_products=part.num_products)
    set_metadata(proto, {METADATA_KEY: metadata(facts)})
    # Chinese-CLIP's float16 files keep their weights outside, and its guides copy both.
    save(proto, path, outside=True if form == "fp16" else None)
    return parity.compare(expected, path, kind, form, tolerance=tolerance, left_out=facts.left_out, share=part)


# --- float16


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
        if node.op_type not in FULL_PRECISION:
            nodes.append(node)
            continue
        # Between casts; whole-number inputs, the axes of a mean, are constants that stay as they are.
        name, output = node.name, node.output[0]
        for position in range(len(node.input)) if node.op_type == "LayerNormalization" else range(1):
            full = f"{name}_input_{position}"
            nodes.append(_cast(onnx, node.input[position], full, onnx.TensorProto.FLOAT))
            node.input[position] = full
        node.output[0] = f"{name}_output"
        nodes += [node, _cast(onnx, node.output[0], output, onnx.TensorProto.FLOAT16)]
    # Casts behind its float inputs and before its float outputs.
    half, full_type = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    ends = {end.name for end in [*graph.input, *graph.output] if end.type.tensor_type.elem_type == full_type}
    renamed = {name: f"{name}_half" for name in ends}
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    first = [_cast(onnx, end.name, renamed[end.name], half) for end in graph.input if end.name in renamed]
    last = [_cast(onnx, renamed[end.name], end.name, full_type) for end in graph.output if end.name in renamed]
    del graph.node[:]
    graph.node.extend([*first, *nodes, *last])
    return proto


def _half(onnx: Any, tensor: Any, base: Path) -> Any:
    values = onnx.numpy_helper.to_array(tensor)
    if not (np.abs(values) <= np.finfo(np.float16).max).all():
        raise CheckpointError(f"{tensor.name} holds values too large for float16; use fp32", at=base)
    return onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name)


def _cast(onnx: Any, source: str, target: str, data_type: int) -> Any:
    return onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=data_type)


# --- int8


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
    found: list[tuple[float, int, list[str]]] = []
    worst_first: list[str] = []
    number = 0
    while number <= len(worst_first) // 2:
        for levels in LEVELS:
            choice = Choice(levels, tuple(worst_first[:number]))
            save(quantised(base, form, choice), path)
            smallest = float(parity.cosines(reference, path, kind, form).min())
            if smallest >= TARGET:
                return choice
            found.append((smallest, levels, worst_first[:number]))
        if not number:
            losses = product_losses(base, kind, reference, path)
            worst_first = sorted(losses, key=lambda name: losses[name], reverse=True)
        number = 2 * number or 1
    _, levels, left_out = max(found)
    return Choice(levels, tuple(left_out))


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
        nodes += _int8_product(onnx, node, nodes, form)
    used = {name for node in nodes for name in node.input}
    kept = [one for one in [*graph.initializer, *known.values()] if one.name in used]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return proto


def _int8_product(onnx: Any, node: Any, before: list[Any], form: str) -> list[Any]:
    """The nodes of a product; what is equal in several of them is not repeated.

    "int8.openvino": weights that are int8 in the file, which OpenVINO multiplies as such where it may. "int8": the
    product of integers, as ONNX Runtime knows to fuse it; equal inputs are quantised once.
    """
    (x, weight), product = node.input, node.output[0]
    make = onnx.helper.make_node
    if form != "int8":
        full = f"{weight}_float"
        shared = make("DequantizeLinear", [f"{weight}_int8", f"{weight}_scale"], [full], name=full, axis=1)
        node.input[1] = full
        rest = [node]
    else:
        parts = [f"{x}_uint8", f"{x}_scale", f"{x}_zero"]
        shared = make("DynamicQuantizeLinear", [x], parts, name=f"{x}_quantise")
        whole, cast, scales = (f"{product}_{step}" for step in ("int32", "cast", "scales"))
        rest = [
            make("MatMulInteger", [parts[0], f"{weight}_int8", parts[2]], [whole], name=f"{node.name}_int32"),
            make("Cast", [whole], [cast], name=f"{node.name}_cast", to=onnx.TensorProto.FLOAT),
            make("Mul", [parts[1], f"{weight}_scale"], [scales], name=f"{node.name}_scales"),
            make("Mul", [cast, scales], [product], name=node.name),
        ]
    return [*([] if any(one.name == shared.name for one in before) else [shared]), *rest]


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
        positions = sizes[2:] if node.op_type == "Conv" else sizes[:-1]
        work[name] = int(np.prod(weight.dims)) * int(np.prod(positions))
    chosen = [name for name, weight in _weights(proto).items() if _may_be_int8(weight) and name not in left_out]
    return Share(len(chosen), len(work), sum(work[name] for name in chosen) / max(sum(work.values()), 1))


def product_losses(base: Path, kind: Kind, reference: Reference, scratch: Path) -> dict[str, float]:
    """The share of its output's energy that each product loses if only it is in int8, on its own real inputs.

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
