"""A stand-in for the module `tensorrt` that checks every call; ONNX Runtime computes what an engine would.

`SIGNATURES` are those of the bindings of TensorRT 10.13, 10.16 and 11.4, read from them. 8.6 has the same, but wants
EXPLICIT_BATCH and has no INT64 at the ends of an engine; 11 has neither the flag FP16 nor the precision of a layer.
"""

import ctypes
import json
import weakref
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

SIGNATURES = {
    "Builder.create_network": "flags",
    "Builder.create_builder_config": "",
    "Builder.create_optimization_profile": "",
    "Builder.build_serialized_network": "network config",
    "OnnxParser.__init__": "network logger",
    "OnnxParser.parse_from_file": "model",
    "OnnxParser.get_error": "index",
    "IBuilderConfig.set_flag": "flag",
    "IBuilderConfig.set_memory_pool_limit": "pool pool_size",
    "IBuilderConfig.add_optimization_profile": "profile",
    "IBuilderConfig.create_timing_cache": "serialized_timing_cache",
    "IBuilderConfig.set_timing_cache": "cache ignore_mismatch",
    "IBuilderConfig.get_timing_cache": "",
    "IOptimizationProfile.set_shape": "input min opt max",
    "INetworkDefinition.get_layer": "index",
    "INetworkDefinition.get_input": "index",
    "INetworkDefinition.get_output": "index",
    "ILayer.get_output": "index",
    "ILayer.set_output_type": "index dtype",
    "ITimingCache.serialize": "",
    "ILogger.log": "severity msg",
    "Runtime.__init__": "logger",
    "Runtime.deserialize_cuda_engine": "serialized_engine",
    "ICudaEngine.get_tensor_name": "index",
    "ICudaEngine.get_tensor_mode": "name",
    "ICudaEngine.get_tensor_shape": "name",
    "ICudaEngine.get_tensor_dtype": "name",
    "ICudaEngine.get_tensor_profile_shape": "name profile_index",
    "ICudaEngine.create_execution_context": "strategy",
    "IExecutionContext.set_input_shape": "name shape",
    "IExecutionContext.get_tensor_shape": "name",
    "IExecutionContext.set_tensor_address": "name memory",
    "IExecutionContext.execute_async_v3": "stream_handle",
}
MAGIC = b"engine of the stand-in\n"
GPU = "NVIDIA Stand-in"
STREAM = 77

DataType = IntEnum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL")
TensorIOMode = IntEnum("TensorIOMode", "NONE INPUT OUTPUT")
MemoryPoolType = IntEnum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM")
LayerType = IntEnum("LayerType", "ELEMENTWISE REDUCE NORMALIZATION SOFTMAX MATRIX_MULTIPLY SHAPE OTHER")
ElementWiseOperation = IntEnum("ElementWiseOperation", "SUM PROD POW")
TYPES = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.INT64: DataType.INT64,
    TensorProto.INT32: DataType.INT32,
    TensorProto.BOOL: DataType.BOOL,
}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}
LAYERS = {
    "LayerNormalization": LayerType.NORMALIZATION,
    "Softmax": LayerType.SOFTMAX,
    "ReduceMean": LayerType.REDUCE,
    "ReduceMax": LayerType.REDUCE,
    "MatMul": LayerType.MATRIX_MULTIPLY,
    "Shape": LayerType.SHAPE,
    "Pow": LayerType.ELEMENTWISE,
    "Add": LayerType.ELEMENTWISE,
    "Mul": LayerType.ELEMENTWISE,
}
OPERATIONS = {"Pow": ElementWiseOperation.POW, "Add": ElementWiseOperation.SUM, "Mul": ElementWiseOperation.PROD}


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = Severity
    ready = False

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    """The bindings give out an object with the buffer protocol."""


class ITensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...] = ()) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class ILayer:
    """As the bindings give it out: the base class, without `op`. `precision` and output types are gone in 11."""

    def __init__(self, node: Any, outputs: list[ITensor]) -> None:
        self.name, self._node, self._outputs = node.name, node, outputs
        self.type = LAYERS.get(node.op_type, LayerType.OTHER)
        self.num_outputs = len(outputs)
        self.pinned: dict[int, DataType] = {}

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        assert 0 <= index < self.num_outputs
        self.pinned[index] = dtype


class IElementWiseLayer(ILayer):
    @property
    def op(self) -> ElementWiseOperation:
        assert self.type == LayerType.ELEMENTWISE, f"{self.name} was taken for an elementwise layer"
        return OPERATIONS[self._node.op_type]


class Layer11(ILayer):
    __slots__ = ()
    set_output_type = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object) -> None:
        assert name != "precision", "TensorRT 11 has no precision of a layer"
        super().__setattr__(name, value)


class INetworkDefinition:
    def __init__(self, trt: ModuleType, flags: int) -> None:
        self.trt, self.flags = trt, flags
        self.layers: list[ILayer] = []
        self.ends: tuple[list[ITensor], list[ITensor]] = ([], [])
        self.plan = b""
        self.parser: weakref.ref[OnnxParser] | None = None

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.ends[0]))
    num_outputs = property(lambda self: len(self.ends[1]))

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def get_input(self, index: int) -> ITensor:
        return self.ends[0][index]

    def get_output(self, index: int) -> ITensor:
        return self.ends[1][index]


class ParserError:
    def __init__(self, message: str) -> None:
        self.message = message

    def __str__(self) -> str:
        return self.message


class OnnxParser:
    # What a test makes it fail with.
    failures: tuple[str, ...] = ()

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert isinstance(network, INetworkDefinition)
        assert logger.ready
        self.network, self.num_errors = network, 0
        network.parser = weakref.ref(self)

    def parse_from_file(self, model: str) -> bool:
        assert isinstance(model, str)
        self.num_errors = len(self.failures)
        if self.failures:
            return False
        proto = onnx.load(model)
        types = {one.name: _tensor(one) for one in onnx.shape_inference.infer_shapes(proto).graph.value_info}
        self.network.ends = ([_tensor(one) for one in proto.graph.input], [_tensor(one) for one in proto.graph.output])
        types |= {one.name: one for one in self.network.ends[1]}
        for end in [*self.network.ends[0], *self.network.ends[1]]:
            if end.dtype is DataType.INT64 and self.network.trt.__version__.startswith("8."):
                end.dtype = DataType.INT32
        layer_class = Layer11 if self.network.trt.__version__.startswith("11.") else ILayer
        for node in proto.graph.node:
            outputs = [types.get(name, ITensor(name, DataType.FLOAT)) for name in node.output]
            self.network.layers.append(layer_class(node, outputs))
        self.network.plan = proto.SerializeToString()
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError(self.failures[index])


def _tensor(value: Any) -> ITensor:
    sizes = value.type.tensor_type.shape.dim
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)
    return ITensor(value.name, TYPES[value.type.tensor_type.elem_type], shape)


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        for shape in (min, opt, max):
            assert all(type(size) is int for size in shape)
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.pools: dict[MemoryPoolType, int] = {}
        self.profiles: list[IOptimizationProfile] = []
        self.cache: ITimingCache | None = None

    def set_flag(self, flag: IntEnum) -> None:
        self.flags.append(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert type(pool_size) is int
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        assert profile.shapes, "a profile without shapes"
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if serialized_timing_cache.startswith(b"damaged"):
            return None
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache.content.startswith(b"other GPU"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        assert self.cache is not None
        return ITimingCache(self.cache.content + b"+")


class Builder:
    trt: ModuleType
    # What a test makes it fail with.
    failure: str | None = None
    # What was built, for tests to look at.
    built: "list[tuple[INetworkDefinition, IBuilderConfig]]" = []  # noqa: RUF012

    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        assert logger.ready, "ILogger.__init__ was not called"
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert type(flags) is int
        known = self.trt.NetworkDefinitionCreationFlag
        if self.trt.__version__.startswith("8."):
            assert flags & 1 << int(known.EXPLICIT_BATCH)
        return INetworkDefinition(self.trt, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        assert network.parser is not None
        assert network.parser() is not None, "the parser was freed, and with it the weights"
        strong = self.trt.__version__.startswith("11.") or bool(network.flags & 1 << 1)
        assert not (strong and {"FP16", "OBEY_PRECISION_CONSTRAINTS"} & set(config.flags))
        assert not (strong and any(layer.pinned for layer in network.layers))
        self.built.append((network, config))
        if self.failure is not None:
            self.logger.log(Severity.ERROR, self.failure)
            return None
        shapes = {name: shape for profile in config.profiles for name, shape in profile.shapes.items()}
        for tensor in network.ends[0]:
            _check_profile(tensor, shapes.get(tensor.name))
        header = {
            "version": self.trt.__version__,
            "shapes": shapes,
            "ends": [[(one.name, one.dtype.name, one.shape) for one in ends] for ends in network.ends],
        }
        return IHostMemory(MAGIC + json.dumps(header).encode() + b"\n" + network.plan)


def _check_profile(tensor: ITensor, spans: list[tuple[int, ...]] | None) -> None:
    if -1 not in tensor.shape:
        assert spans is None
        return
    assert spans is not None, f"{tensor.name} has free sizes and no profile"
    for span in spans:
        assert all(size in (-1, given) for size, given in zip(tensor.shape, span, strict=True))


class Runtime:
    trt: ModuleType

    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        assert logger.ready
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        if not serialized_engine.startswith(MAGIC):
            self.logger.log(Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        text, plan = serialized_engine.removeprefix(MAGIC).split(b"\n", 1)
        header = json.loads(text)
        if header["version"] != self.trt.__version__:
            self.logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        return ICudaEngine(header, plan, self.logger)


class ICudaEngine:
    def __init__(self, header: dict[str, Any], plan: bytes, logger: ILogger) -> None:
        self.header, self.plan, self.logger = header, plan, logger
        self.tensors = {
            name: (mode, dtype, tuple(shape))
            for mode, ends in zip((TensorIOMode.INPUT, TensorIOMode.OUTPUT), header["ends"], strict=True)
            for name, dtype, shape in ends
        }

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.tensors[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return self.header["shapes"][name]

    def create_execution_context(self, strategy: object = None) -> "IExecutionContext":
        assert strategy is None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.engine.get_tensor_mode(name) is TensorIOMode.INPUT
        assert type(shape) is tuple
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (batch,) = {shape[0] for shape in self.shapes.values()}
        return tuple(batch if size == -1 else size for size in self.engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int
        assert memory > 0
        self.addresses[name] = memory
        return name in self.engine.tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        assert self.addresses.keys() == self.engine.tensors.keys()
        arrays = {name: self._at(name) for name in self.addresses}
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(self.engine.plan, settings, providers=["CPUExecutionProvider"])
        # TensorRT 8 takes int32 where the file says int64.
        wide = {one.name: np.int64 if one.type == "tensor(int64)" else None for one in session.get_inputs()}
        fed = {name: arrays[name].astype(wide[name] or arrays[name].dtype) for name in wide}
        for end, result in zip(session.get_outputs(), session.run(None, fed), strict=True):
            arrays[end.name][...] = result
        self.addresses.clear()
        return True

    def _at(self, name: str) -> Any:
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])
        shape = self.shapes[name] if name in self.shapes else self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def module(version: str) -> ModuleType:
    """The stand-in of a version, "8.6.1", "10.13.3.9" or "11.4.0.106"; nothing is shared between two of them."""
    trt = ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__version__ = version  # type: ignore[attr-defined]
    major = int(version.split(".")[0])
    flags = ["TF32", *(["FP16", "OBEY_PRECISION_CONSTRAINTS"] if major < 11 else [])]
    creation = ["EXPLICIT_BATCH"] * (major < 11) + ["STRONGLY_TYPED"] * (major >= 10)
    members: dict[str, Any] = {
        "BuilderFlag": IntEnum("BuilderFlag", flags),
        "NetworkDefinitionCreationFlag": IntEnum("NetworkDefinitionCreationFlag", creation, start=0),
        "Builder": type("Builder", (Builder,), {"trt": trt, "built": []}),
        "OnnxParser": type("OnnxParser", (OnnxParser,), {}),
        "Runtime": type("Runtime", (Runtime,), {"trt": trt}),
    }
    shared = (ILogger, DataType, TensorIOMode, MemoryPoolType, LayerType, ElementWiseOperation, IElementWiseLayer)
    for name, member in {**{one.__name__: one for one in shared}, **members}.items():
        setattr(trt, name, member)
    return trt
