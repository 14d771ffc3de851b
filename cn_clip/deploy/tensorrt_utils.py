"""TensorRT under the names of Chinese-CLIP, over ONNX Runtime's provider: what its deployment guide imports.

ONNX Runtime has no networks, contexts and bindings to hand out, so the helpers that take them say so.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cn_clip.clip.backends import tensor_rt
from cn_clip.clip.backends.names import Kind
from cn_clip.deploy.benchmark_utils import track_infer_time
from cn_clip.errors import ConfigError

TRT_LOGGER = logging.getLogger("onnxruntime")


class TensorRTModel:
    """An engine file, opened: `TensorRTModel(path)(inputs={"image": pixels})["unnorm_image_features"]`."""

    def __init__(self, engine_path: str | Path, *, device: str | torch.device | None = None) -> None:
        """device: cuda or cuda:N; default the first GPU. Raises what `tensor_rt.open_engine` raises."""
        self.load_engine(str(engine_path), device=device)

    def __call__(self, inputs: Mapping[str, Tensor], time_buffer: list[float] | None = None) -> dict[str, Tensor]:
        """The outputs by name, on the device of the first input; they pass through the processor's memory.

        inputs: by name, of any dtype: they are cast to what the engine takes. time_buffer: the seconds that the outputs
        took are appended to it. Raises ConfigError for another name or shape than the engine takes.
        """
        names = sorted(one.name for one in self.session.get_inputs())
        if sorted(inputs) != names:
            raise ConfigError(f"takes the inputs {names}, got {sorted(inputs)}", at=self.path)
        for name, (least, _, most) in self.shapes.items():
            shape = list(inputs[name].shape)
            if len(shape) != len(least) or not all(
                low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
            ):
                span = tuple(least) if least == most else f"{tuple(least)} to {tuple(most)}"
                raise ConfigError(f"takes {name} of the shape {span}, got {tuple(shape)}", at=self.path)
        device = next(iter(inputs.values())).device
        seconds: list[float] = []
        with track_infer_time(seconds):
            fed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
            found = tensor_rt.run_engine(self.path, self.session, fed)
            outputs = {name: torch.from_numpy(values).to(device) for name, values in found.items()}
        if time_buffer is not None:
            time_buffer += seconds
        return outputs

    def load_engine(self, engine_file_path: str, *, device: str | torch.device | None = None) -> Any:
        """Opens a file instead of the one that is open; returns its session. Raises as the constructor."""
        self.session = tensor_rt.open_engine(engine_file_path, device=device)
        self.path, self.shapes = engine_file_path, tensor_rt.shapes_of(self.session)
        return self.session


@dataclass
class TensorRTShape:
    """The least, the usual and the largest shape of an input; None: of every input."""

    min_shape: Sequence[int]
    optimal_shape: Sequence[int]
    max_shape: Sequence[int]
    input_name: str | None

    def check_validity(self) -> None:
        """Raises AssertionError for shapes of different lengths, empty batches, or no name."""
        shapes = (self.min_shape, self.optimal_shape, self.max_shape)
        if len({len(shape) for shape in shapes}) > 1 or not all(shape and shape[0] > 0 for shape in shapes):
            raise AssertionError(f"expected three shapes of one length, of batches of 1 or more, got {shapes}")
        if self.input_name is None:
            raise AssertionError("input_name: expected the name of an input, got None")

    def make_copy(self, input_name: str) -> "TensorRTShape":
        """The same shapes for another input."""
        return dataclasses.replace(self, input_name=input_name)

    def generate_multiple_shapes(self, input_names: list[str]) -> list["TensorRTShape"]:
        """The same shapes for each input; raises AssertionError when they are those of one already."""
        if self.input_name is not None:
            raise AssertionError(f"input_name: expected None, got {self.input_name!r}")
        return [self.make_copy(name) for name in input_names]


def fix_fp16_network(network_definition: Any, fp16_banned_ops: Sequence[str] | None = None) -> NoReturn:
    """Raises ConfigError: there is no network to change."""
    _refuse("fix_fp16_network")


def build_engine(
    runtime: Any,
    onnx_file_path: str,
    logger: Any,
    fp16: bool,
    int8: bool,
    workspace_size: int | None = None,
    fp16_fix: Callable[..., Any] = fix_fp16_network,
    fp16_banned_ops: Sequence[str] | None = None,
    timing_cache: str | None = None,
    **kwargs: Any,
) -> TensorRTModel:
    """The engine of an ONNX file of a tower, opened; `onnx_to_tensorrt` writes it to a file.

    Shapes: `input_shapes`, one TensorRTShape, or `min_shape`, `optimal_shape` and `max_shape`; batches go from 1 to the
    largest. workspace_size: bytes. timing_cache: a folder. `runtime` and `logger` are not used. Raises ConfigError for
    int8, a `fp16_fix` of one's own and banned operations, and what `tensor_rt.build_engine` raises.
    """
    del runtime, logger
    if int8 or fp16_fix is not fix_fp16_network or fp16_banned_ops:
        raise ConfigError(
            "build_engine: int8, a fp16_fix of your own and fp16_banned_ops are not had here; leave them out"
        )
    names = ("min_shape", "optimal_shape", "max_shape")
    shapes = kwargs.get("input_shapes")
    if all(name in kwargs for name in names):
        least, usual, most = (kwargs[name] for name in names)
        shapes = [TensorRTShape(least, usual, most, "")]
    if not shapes or len(shapes) != 1:
        raise AssertionError(f"input_shapes: expected the shape of the tower's one input, got {shapes!r}")
    shape: TensorRTShape = shapes[0]
    shape.check_validity()
    kind: Kind = "text" if len(shape.max_shape) == 2 else "image"
    build = tensor_rt.Build(
        precision="fp16" if fp16 else "fp32",
        batch=shape.optimal_shape[0],
        max_batch=shape.max_shape[0],
        context_length=shape.max_shape[-1] if kind == "text" else tensor_rt.CACHED_LENGTH,
        workspace_gib=None if workspace_size is None else workspace_size / 2**30,
        timing_cache=timing_cache,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.trt"
        tensor_rt.build_engine(onnx_file_path, kind, path, build)
        return TensorRTModel(path)


def get_binding_idxs(engine: Any, profile_index: int) -> NoReturn:
    """Raises ConfigError: there are no bindings."""
    _refuse("get_binding_idxs")


def get_output_tensors(
    context: Any, host_inputs: Sequence[Tensor], input_binding_idxs: Sequence[int], output_binding_idxs: Sequence[int]
) -> NoReturn:
    """Raises ConfigError: there is no context."""
    _refuse("get_output_tensors")


def _refuse(name: str) -> NoReturn:
    raise ConfigError(
        f"{name}: TensorRT runs inside ONNX Runtime here, which hands out no networks, contexts and bindings; call a "
        "TensorRTModel instead"
    )
