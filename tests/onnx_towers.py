"""Small ONNX files made by hand: one matrix product as a tower, with the tensor names of Chinese-CLIP's exports."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RESOLUTION, LENGTH, WIDTH = 8, 52, 4
NAMES = {"image": ("image", "unnorm_image_features"), "text": ("text", "unnorm_text_features")}
SHAPES = {"image": (3, RESOLUTION, RESOLUTION), "text": (LENGTH,)}


def weights(kind: str, width: int = WIDTH) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((int(np.prod(SHAPES[kind])), width)).astype(np.float32)


def write_tower(
    path: Path, kind: str, *, batch: int | str = 1, width: int = WIDTH, half: bool = False, metadata: str | None = None
) -> Path:
    """A file as Chinese-CLIP exports them by default: a batch of one, 52 tokens; half: with float16 ends."""
    source, target = NAMES[kind]
    number = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", [source], ["numbers"], to=number),
        helper.make_node("Flatten", ["numbers"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], [target]),
    ]
    values = weights(kind, width).astype(np.float16 if half else np.float32)
    graph = helper.make_graph(
        nodes,
        "tower",
        [
            helper.make_tensor_value_info(
                source, number if kind == "image" else TensorProto.INT64, [batch, *SHAPES[kind]]
            )
        ],
        [helper.make_tensor_value_info(target, number, [batch, width])],
        [numpy_helper.from_array(values, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if metadata is not None:
        helper.set_model_props(model, {"cn_clip": metadata})
    onnx.save(model, path)
    return path


def expected_rows(kind: str, inputs: NDArray[Any]) -> NDArray[np.float32]:
    rows = inputs.reshape(len(inputs), -1).astype(np.float32) @ weights(kind)
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def some_inputs(kind: str, count: int) -> NDArray[Any]:
    rng = np.random.default_rng(5)
    if kind == "image":
        return rng.standard_normal((count, *SHAPES["image"]), dtype=np.float32)
    return rng.integers(1, 60, (count, LENGTH))
