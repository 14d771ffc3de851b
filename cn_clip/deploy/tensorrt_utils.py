"""TensorRT under the names of Chinese-CLIP, over `clip.backends`: what its deployment guide imports, and its helpers.

Its helpers count the bindings of an engine, which TensorRT 10 has no more; here they count its inputs and outputs.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip.backends import engines, tensor_rt
from cn_clip.clip.backends.base import Kind
from cn_clip.deploy.benchmark_utils import track_infer_time
from cn_clip.errors import ConfigError


class TensorRTModel(tensor_rt.TensorRTModel):
    """An engine file, opened: `TensorRTModel(path)(inputs={"image": pixels})["unnorm_image_features"]`."""

    def __call__(self, inputs: Mapping[str, Tensor], time_buffer: list[float] | None = None) -> dict[str, Tensor]:
        """The outputs by name; the seconds that they took are appended to `time_buffer`."""
        if time_buffer is None:
            return super().__call__(inputs)
        with track_infer_time(time_buffer):
            outputs = super().__call__(inputs)
            if self.gpu.device.type == "cuda":
                torch.cuda.synchronize(self.gpu.device)
        return outputs

    def load_engine(self, engine_file_path: str) -> Any:
        """The engine of another file; raises AssertionError when there is none, CheckpointError as on opening."""
        if not Path(engine_file_path).exists():
            raise AssertionError(f"{engine_file_path}: no such file; expected an engine")
        return TensorRTModel(engine_file_path, device=self.gpu.device)._engine


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


def fix_fp16_network(network_definition: Any, fp16_banned_ops: Sequence[str] | None = None) -> Any:
    """Holds the layers that float16 is too narrow for to float32, and those with one of these parts in their names."""
    engines._keep_float(tensor_rt.library(), network_definition, fp16_banned_ops or ())
    return network_definition


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
) -> Any:
    """The engine of an ONNX file of a tower, deserialized by `runtime`.

    Shapes: `input_shapes`, one TensorRTShape, or `min_shape`, `optimal_shape` and `max_shape`; batches go from 1 to the
    largest. workspace_size: bytes. Messages go to `logging`, not to `logger`. Raises ConfigError for int8 and a
    `fp16_fix` of one's own, which are not had here, and what `engines.build_engine` raises.
    """
    del logger
    if int8 or fp16_fix is not fix_fp16_network:
        raise ConfigError("build_engine: int8 and a fp16_fix of your own are not had here; leave them out")
    shape = _shape_of(kwargs)
    kind: Kind = "text" if len(shape.max_shape) == 2 else "image"
    build = engines.Build(
        precision="fp16" if fp16 else "fp32",
        batch=shape.optimal_shape[0],
        max_batch=shape.max_shape[0],
        context_length=shape.max_shape[1] if kind == "text" else engines.CACHED_LENGTH,
        kept_float=tuple(fp16_banned_ops or ()),
        workspace_gib=None if workspace_size is None else workspace_size / 2**30,
        timing_cache=timing_cache,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.trt"
        engines.build_engine(onnx_file_path, kind, path, build)
        return runtime.deserialize_cuda_engine(path.read_bytes())


def _shape_of(settings: Mapping[str, Any]) -> TensorRTShape:
    names = ("min_shape", "optimal_shape", "max_shape")
    if all(name in settings for name in names):
        return TensorRTShape(settings["min_shape"], settings["optimal_shape"], settings["max_shape"], None)
    shapes = settings.get("input_shapes")
    if not shapes or len(shapes) != 1:
        raise AssertionError(f"input_shapes: expected the shape of the tower's one input, got {shapes!r}")
    shapes[0].check_validity()
    shape: TensorRTShape = shapes[0]
    return shape


def get_binding_idxs(engine: Any, profile_index: int) -> tuple[list[int], list[int]]:
    """The numbers of an engine's inputs and of its outputs; they are alike for every profile."""
    trt, found = tensor_rt.library(), range(engine.num_io_tensors)
    inputs = [
        index for index in found if engine.get_tensor_mode(engine.get_tensor_name(index)) == trt.TensorIOMode.INPUT
    ]
    return inputs, [index for index in found if index not in inputs]


def get_output_tensors(
    context: Any, host_inputs: Sequence[Tensor], input_binding_idxs: Sequence[int], output_binding_idxs: Sequence[int]
) -> dict[str, Tensor]:
    """Sets the shapes of the inputs, and returns room for the outputs by name, on the device of the inputs."""
    engine = context.engine
    for tensor, index in zip(host_inputs, input_binding_idxs, strict=True):
        context.set_input_shape(engine.get_tensor_name(index), tuple(tensor.shape))
    outputs = {}
    for name in map(engine.get_tensor_name, output_binding_idxs):
        dtype = tensor_rt.DTYPES[engine.get_tensor_dtype(name).name]
        outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=host_inputs[0].device)
    return outputs


def __getattr__(name: str) -> Any:
    if name == "TRT_LOGGER":  # needs TensorRT, which importing this module does not
        return tensor_rt.make_log(tensor_rt.library())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
