"""Exported towers as TensorRT engines on NVIDIA GPUs: opening them and running them.

Written against the Python bindings of TensorRT 10.13, 10.16 and 11.4, whose calls by tensor name TensorRT 8.6 has too,
and tested with a stand-in that checks every call. No engine has been built or run on a GPU with it yet.
"""

# B batch, R resolution, L tokens, D embedding

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip.backends.base import ExportedBackend, Kind, Pixels, TokenIds, TowerFacts
from cn_clip.clip.backends.onnx_files import INPUTS, MIDDLE, OUTPUTS, facts_of
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.extras import require
from cn_clip.files import settle

TOOL = "python cn_clip/deploy/onnx_to_tensorrt.py"
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}
_logger = logging.getLogger(__name__)


def engine_path(prefix: str | Path, kind: Kind, precision: str) -> Path:
    """`PREFIX.img.fp16.trt`: the engine of a tower."""
    return Path(f"{prefix}.{MIDDLE[kind]}.{precision}.trt")


def description_path(path: str | Path) -> Path:
    """`PREFIX.img.fp16.trt.json`: what an engine does not say of itself. The engine runs without it."""
    return Path(f"{path}.json")


def library() -> Any:
    """The module `tensorrt`; raises MissingExtraError without it, ConfigError when its libraries cannot be loaded."""
    try:
        return require("tensorrt", extra="tensorrt", purpose="the tensorrt backend")
    except OSError as error:
        raise ConfigError(f"the tensorrt backend cannot load the libraries of TensorRT ({error})") from error


@dataclass(frozen=True)
class Gpu:
    """The GPU that an engine is built for or runs on. capability: as "9.0"."""

    device: torch.device
    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability})"

    def current(self) -> contextlib.AbstractContextManager[object]:
        """TensorRT works on whichever GPU is current."""
        return torch.cuda.device(self.device)

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of a stream of its own, in the order of PyTorch's: on the default one TensorRT waits too often."""
        current, own = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        own.wait_stream(current)
        yield own.cuda_stream
        current.wait_stream(own)


def find_gpu(device: str | torch.device | None = None) -> Gpu:
    """The GPU of `cuda`, `cuda:N`, or None for the current one; raises ConfigError when there is none such."""
    refusal = f"device: the tensorrt backend runs on cuda or cuda:N, got {str(device)!r}"
    try:
        chosen = torch.device("cuda" if device in (None, "auto") else str(device))
    except RuntimeError as error:
        raise ConfigError(refusal) from error
    if chosen.type != "cuda":
        raise ConfigError(refusal)
    if not torch.cuda.is_available():
        raise ConfigError(
            "the tensorrt backend needs an NVIDIA GPU, and PyTorch finds none here; "
            "use the backend openvino or onnx on a processor"
        )
    gpu = ranks.choose_device(chosen)
    major, minor = torch.cuda.get_device_capability(gpu.index)
    return Gpu(gpu, torch.cuda.get_device_name(gpu.index), f"{major}.{minor}")


def make_log(trt: Any) -> Any:
    """A `tensorrt.ILogger` that passes messages on to `logging` and keeps the errors in `errors`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg.strip())
            else:
                level = logging.WARNING if severity == trt.ILogger.WARNING else logging.DEBUG
                _logger.log(level, "TensorRT: %s", msg)

    return Log()


def reasons(log: Any) -> str:
    """The last errors of a log on one line, for a sentence."""
    return "; ".join(" ".join(message.split())[:300] for message in log.errors[-3:]) or "it gives no reason"


def started(start: Callable[[Any], Any], log: Any, gpu: Gpu) -> Any:
    """A `Builder` or `Runtime`; raises ConfigError where the bindings give none, as with a driver too old for them."""
    try:
        return start(log)
    except TypeError as error:
        raise ConfigError(
            f"TensorRT cannot start on {gpu}: {reasons(log)}; check that the driver is new enough for its CUDA version"
        ) from error


@dataclass(frozen=True)
class Port:
    """An input or output of an engine. shape: None where it is free; least, most: the shapes an input may have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    least: tuple[int, ...] = ()
    most: tuple[int, ...] = ()


class TensorRTModel:
    """An engine file, opened: `TensorRTModel(path)(inputs={"image": pixels})["unnorm_image_features"]`.

    Not for several threads at once.
    """

    def __init__(self, engine_path: str | Path, *, device: str | torch.device | None = None) -> None:
        """device: cuda or cuda:N; default the current GPU.

        Raises ConfigError without such a GPU, MissingExtraError without `tensorrt`, CheckpointError for a file that is
        no engine, or one of another version of TensorRT or another kind of GPU.
        """
        self.path = str(engine_path)
        settle(Path(engine_path).parent)
        trt = library()
        self.gpu = find_gpu(device)
        self.description = read_description(engine_path)
        self._log = make_log(trt)
        with self.gpu.current():
            self._runtime, self._engine = self._opened(trt)
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise CheckpointError(f"TensorRT cannot run it on {self.gpu}: {reasons(self._log)}", at=self.path)
        self.inputs, self.outputs = _ports(trt, self._engine, self.path)

    def _opened(self, trt: Any) -> tuple[Any, Any]:
        try:
            plan = Path(self.path).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot be read ({error.strerror}); build the engine with {TOOL}", at=self.path
            ) from error
        built_with = self.description.get("tensorrt")
        if built_with is not None and release(built_with) != release(trt.__version__):
            raise CheckpointError(self._stale(trt))
        runtime = started(trt.Runtime, self._log, self.gpu)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            if (known := what_it_is(self.path)) is not None:
                raise CheckpointError(known, at=self.path)
            raise CheckpointError(f"{self._stale(trt)} (TensorRT: {reasons(self._log)})")
        return runtime, engine

    def _stale(self, trt: Any) -> str:
        here = f"here is TensorRT {trt.__version__} on {self.gpu}"
        again = f"build it again: {self.description.get('command') or f'{TOOL} --help'}"
        if "tensorrt" not in self.description:
            return f"{self.path}: no engine for this machine, {here}, and engines run where they were built; {again}"
        built = f"TensorRT {self.description['tensorrt']} on {self.description.get('gpu', 'an unknown GPU')}"
        return f"{self.path}: the engine was built with {built}, {here}; {again}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, on the GPU of the engine, in the order of its current stream.

        inputs: by name, on the same GPU, of any dtype: they are cast to what the engine takes.
        Raises ConfigError for another name, device or shape than the engine takes.
        """
        if set(inputs) != set(self.inputs):
            raise ConfigError(f"takes the inputs {sorted(self.inputs)}, got {sorted(inputs)}", at=self.path)
        fed = {name: self._fitting(port, inputs[name]) for name, port in self.inputs.items()}
        with self.gpu.current():
            for name, tensor in fed.items():
                self._must(self._context.set_input_shape(name, tuple(tensor.shape)), f"the shape of {name}")
            found = {name: self._room(port) for name, port in self.outputs.items()}
            for name, tensor in {**fed, **found}.items():
                self._must(self._context.set_tensor_address(name, tensor.data_ptr()), f"the memory of {name}")
            with self.gpu.stream() as handle:
                self._must(self._context.execute_async_v3(handle), "to run")
        return found

    def _fitting(self, port: Port, tensor: Tensor) -> Tensor:
        if tensor.device != self.gpu.device:
            raise ConfigError(f"{port.name} lies on {tensor.device}, expected {self.gpu.device}", at=self.path)
        shape = tuple(tensor.shape)
        if len(shape) != len(port.least) or not all(
            low <= size <= high for low, size, high in zip(port.least, shape, port.most, strict=True)
        ):
            span = str(port.least) if port.least == port.most else f"{port.least} to {port.most}"
            raise ConfigError(f"takes {port.name} of the shape {span}, got {shape}", at=self.path)
        return tensor.to(port.dtype).contiguous()

    def _room(self, port: Port) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(port.name))
        return torch.empty(shape, dtype=port.dtype, device=self.gpu.device)

    def _must(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise CheckpointError(f"TensorRT refuses {what}: {reasons(self._log)}", at=self.path)


class TensorRtTower:
    """One engine as a tower over numpy arrays."""

    provider, on_gpu = "", True

    def __init__(self, path: str | Path, kind: Kind, *, device: str | torch.device | None = None) -> None:
        """Raises what `TensorRTModel` raises; CheckpointError for an engine that is no tower of this kind."""
        self.model = TensorRTModel(path, device=device)
        self.path = str(path)
        facts = self.model.description.get("facts")
        self.facts: TowerFacts = facts_of(
            self.path,
            kind,
            inputs={port.name: _shape(port) for port in self.model.inputs.values()},
            outputs={port.name: port.shape for port in self.model.outputs.values()},
            metadata=None if facts is None else json.dumps(facts),
        )
        self._input, self._output = INPUTS[kind], OUTPUTS[kind]
        most = self.model.inputs[self._input].most
        self._most = most[0]
        if kind == "text":
            self.facts = replace(self.facts, max_length=most[1])

    def run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        """Batches larger than the engine takes are cut."""
        nothing = np.empty((0, self.facts.embed_dim), dtype=np.float32)
        pieces = [inputs[start : start + self._most] for start in range(0, len(inputs), self._most)]
        return np.concatenate([nothing, *(self._run(piece) for piece in pieces)])

    def _run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        fed = torch.from_numpy(inputs).to(self.model.gpu.device)
        features: NDArray[np.floating] = self.model({self._input: fed})[self._output].float().cpu().numpy()
        return features


def open_engines(
    image_path: str | Path | None, text_path: str | Path | None, *, device: str | torch.device | None = None
) -> ExportedBackend:
    """The engines of a model as a backend; a missing one is an error only when it is asked for.

    Raises what `TensorRtTower` and `ExportedBackend` raise.
    """
    image = None if image_path is None else TensorRtTower(image_path, "image", device=device)
    text = None if text_path is None else TensorRtTower(text_path, "text", device=device)
    return ExportedBackend(image, text)


def release(version: str) -> str:
    """A version of TensorRT without the number of its package: engines run in the release they were built with."""
    return version.partition(".post")[0]


def read_description(path: str | Path) -> dict[str, Any]:
    """What was written beside an engine; nothing for engines of other programs."""
    beside = description_path(path)
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error}); delete it, or build the engine again", at=beside) from error
    if not isinstance(values, dict):
        raise CheckpointError("expected a JSON object; delete it, or build the engine again", at=beside)
    return values


def _ports(trt: Any, engine: Any, path: str) -> tuple[dict[str, Port], dict[str, Port]]:
    inputs: dict[str, Port] = {}
    outputs: dict[str, Port] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        type_name = engine.get_tensor_dtype(name).name
        if type_name not in DTYPES:
            raise CheckpointError(f"its tensor {name} is {type_name}; expected one of {', '.join(DTYPES)}", at=path)
        shape = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
        port = Port(name, DTYPES[type_name], shape)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            least, most = _span(engine, name, shape)
            inputs[name] = replace(port, least=least, most=most)
        else:
            outputs[name] = port
    return inputs, outputs


def _span(engine: Any, name: str, shape: tuple[int | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest and the largest shape of an input; profiles speak of inputs with free sizes alone."""
    fixed = tuple(size for size in shape if size is not None)
    if len(fixed) == len(shape):
        return fixed, fixed
    least, _, most = (tuple(one) for one in engine.get_tensor_profile_shape(name, 0))
    return least, most


def _shape(port: Port) -> tuple[int | None, ...]:
    """The sizes of an input that has no other."""
    return tuple(low if low == high else None for low, high in zip(port.least, port.most, strict=True))
