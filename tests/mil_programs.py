"""A saved Core ML package, computed by PyTorch: what Linux can tell of the numbers that macOS would give.

The arithmetic is float32 or float64 with the weights of the package; the operations are those of this package's towers.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.models.utils import load_spec
from torch import Tensor


def evaluate(package: Path, inputs: np.ndarray) -> np.ndarray:
    """The one output of the package for its one input."""
    spec = load_spec(str(package))
    weights = str(package / "Data" / "com.apple.CoreML" / "weights")
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    (function,) = program.functions.values()
    (name,) = function.inputs
    values: dict[str, Any] = {name: torch.from_numpy(inputs)}
    for operation in function.operations:
        if operation.op_type == "const":
            continue
        arguments = {key: _value(given, values) for key, given in operation.inputs.items()}
        results = OPERATIONS[operation.op_type](arguments)
        for output, result in zip(operation.outputs, results if isinstance(results, tuple) else [results], strict=True):
            assert tuple(output.shape) == tuple(result.shape), (operation.op_type, output.shape, result.shape)
            values[output.name] = result
    (output,) = function.outputs
    computed: Tensor = values[output.name]
    return computed.float().numpy()


def _value(given: Any, values: dict[str, Any]) -> Any:
    if isinstance(given, (tuple, list)):
        return [_value(one, values) for one in given]
    if given is None or given.name in values:
        return None if given is None else values[given.name]
    constant = given.val
    if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
        return torch.from_numpy(constant.astype(np.float32))
    if isinstance(constant, np.ndarray):
        return torch.from_numpy(constant)
    return constant.item() if isinstance(constant, np.generic) else constant


def _pads(given: dict[str, Any]) -> tuple[int, int]:
    if given["pad_type"] == "valid":
        return (0, 0)
    top, bottom, left, right = given["pad"].tolist()
    assert (top, left) == (bottom, right)
    return (top, left)


def _conv(given: dict[str, Any]) -> Tensor:
    return F.conv2d(
        given["x"],
        given["weight"],
        given.get("bias"),
        stride=given["strides"].tolist(),
        padding=_pads(given),
        groups=given["groups"],
    )


def _avg_pool(given: dict[str, Any]) -> Tensor:
    return F.avg_pool2d(given["x"], given["kernel_sizes"].tolist(), given["strides"].tolist(), _pads(given))


def _slice(given: dict[str, Any]) -> Tensor:
    x: Tensor = given["x"]
    flags = {name: _flags(given, name, x.ndim) for name in ("begin_mask", "end_mask", "squeeze_mask")}
    assert given.get("stride") is None or set(given["stride"].tolist()) == {1}
    index: list[Any] = []
    for axis in range(x.ndim):
        begin, end = int(given["begin"][axis]), int(given["end"][axis])
        if flags["squeeze_mask"][axis]:
            index.append(begin)
        else:
            index.append(slice(None if flags["begin_mask"][axis] else begin, None if flags["end_mask"][axis] else end))
    return x[tuple(index)]


def _flags(given: dict[str, Any], name: str, count: int) -> list[bool]:
    return [False] * count if given.get(name) is None else given[name].tolist()


def _split(given: dict[str, Any]) -> tuple[Tensor, ...]:
    x, axis = given["x"], given["axis"]
    sizes = given.get("split_sizes")
    return x.split(x.shape[axis] // given["num_splits"] if sizes is None else sizes.tolist(), dim=axis)


def _layer_norm(given: dict[str, Any]) -> Tensor:
    assert given["axes"].tolist() in ([-1], [2])
    return F.layer_norm(given["x"], given["x"].shape[-1:], given["gamma"], given["beta"], float(given["epsilon"]))


def _matmul(given: dict[str, Any]) -> Tensor:
    x, y = given["x"], given["y"]
    return (x.mT if given["transpose_x"] else x) @ (y.mT if given["transpose_y"] else y)


def _gather(given: dict[str, Any]) -> Tensor:
    indices: Tensor = given["indices"].long()
    rows: Tensor = given["x"].index_select(given["axis"], indices.flatten())
    assert given["axis"] == 0
    return rows.reshape(*indices.shape, -1)


def _gelu(given: dict[str, Any]) -> Tensor:
    assert given["mode"] == "EXACT"
    return F.gelu(given["x"])


def _expand_dims(given: dict[str, Any]) -> Tensor:
    x = given["x"]
    for axis in sorted(given["axes"].tolist()):
        x = x.unsqueeze(axis)
    return x


TYPES = {"fp32": torch.float32, "fp16": torch.float32, "int32": torch.int32, "bool": torch.bool}
OPERATIONS: dict[str, Any] = {
    "add": lambda given: given["x"] + given["y"],
    "sub": lambda given: given["x"] - given["y"],
    "mul": lambda given: given["x"] * given["y"],
    "not_equal": lambda given: given["x"] != given["y"],
    "cast": lambda given: given["x"].to(TYPES[given["dtype"]]),
    "relu": lambda given: given["x"].relu(),
    "sigmoid": lambda given: given["x"].sigmoid(),
    "softmax": lambda given: given["x"].softmax(given["axis"]),
    "linear": lambda given: F.linear(given["x"], given["weight"], given.get("bias")),
    "reshape": lambda given: given["x"].reshape(given["shape"].tolist()),
    "transpose": lambda given: given["x"].permute(given["perm"].tolist()),
    "concat": lambda given: torch.cat(given["values"], dim=given["axis"]),
    "reduce_mean": lambda given: given["x"].mean(given["axes"].tolist(), keepdim=given["keep_dims"]),
    "avg_pool": _avg_pool,
    "conv": _conv,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "slice_by_index": _slice,
    "split": _split,
}
