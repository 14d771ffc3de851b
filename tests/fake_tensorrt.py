"""A stand-in for ONNX Runtime with its TensorRT provider: it checks the options, and the processor computes.

Engine files are EP context models as https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html describes
them: one node that holds the engine, here the ONNX file itself behind a header.
"""

import json
import re
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import helper

PROVIDER = "TensorrtExecutionProvider"
# Those of https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html that are used here.
OPTIONS = {
    "device_id": r"\d+",
    "trt_fp16_enable": "[01]",
    "trt_layer_norm_fp32_fallback": "[01]",
    "trt_dump_ep_context_model": "1",
    "trt_ep_context_file_path": r".+\.onnx",
    "trt_ep_context_embed_mode": "1",
    "trt_profile_min_shapes": r"\w+:\d+(x\d+)*",
    "trt_profile_opt_shapes": r"\w+:\d+(x\d+)*",
    "trt_profile_max_shapes": r"\w+:\d+(x\d+)*",
    "trt_max_workspace_size": r"\d+",
    "trt_timing_cache_enable": "1",
    "trt_timing_cache_path": ".+",
}
MAGIC = b"engine of the stand-in\n"
_open = onnxruntime.InferenceSession


class Runtime:
    """What a test finds out and decides. built: the options of every build. opened: those of every opened engine."""

    def __init__(self) -> None:
        self.version = "10.9.0"
        self.built: list[dict[str, str]] = []
        self.opened: list[dict[str, str]] = []
        # What a test makes it fail with: when a session is made, when it runs, and when the provider starts.
        self.failure: str | None = None
        self.run_failure: str | None = None
        self.falls_back = self.writes_nothing = False


class Session:
    """An `InferenceSession` with the TensorRT provider first."""

    def __init__(self, runtime: Runtime, path: str, settings: object, providers: list[Any]) -> None:
        (name, options), *others = providers
        assert name == PROVIDER
        assert [one if isinstance(one, str) else one[0] for one in others] == [
            *("CUDAExecutionProvider", "CPUExecutionProvider")
        ]
        for option, value in options.items():
            assert type(value) is str
            assert re.fullmatch(OPTIONS[option], value), f"{option}: {value}"
        self.runtime, self.options, self.proto = runtime, options, onnx.load(path)
        self.is_engine = [node.op_type for node in self.proto.graph.node] == ["EPContext"]
        self.spans: dict[str, list[list[int]]] = {}
        if self.is_engine:
            runtime.opened.append(options)
            content = self._deserialized()
        else:
            runtime.built.append(options)
            content = self.proto.SerializeToString()
            if runtime.failure is not None:
                raise RuntimeError(runtime.failure)
            self._read_profile()
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        self.inner = _open(content, quiet, providers=["CPUExecutionProvider"])
        if not self.is_engine and not self.spans:  # nothing is free: the engine is built at once
            self._dump()

    def _deserialized(self) -> bytes:
        (node,) = self.proto.graph.node
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        assert (node.domain, attributes["embed_mode"]) == ("com.microsoft", 1)
        header, _, content = attributes["ep_cache_context"].removeprefix(MAGIC).partition(b"\n")
        told = json.loads(header) if attributes["ep_cache_context"].startswith(MAGIC) else {"version": None}
        if told["version"] != self.runtime.version:
            raise RuntimeError("TensorRT EP could not deserialize engine from binary data")
        self.spans = told["spans"]
        return content

    def _read_profile(self) -> None:
        for end in self.proto.graph.input:
            sizes = [size.dim_value if size.HasField("dim_value") else None for size in end.type.tensor_type.shape.dim]
            given = [self.options.get(f"trt_profile_{which}_shapes") for which in ("min", "opt", "max")]
            if None not in sizes:
                assert given == [None] * 3
                continue
            assert None not in given, f"{end.name} has free sizes and no profile"
            spans = []
            for text in given:
                name, _, shape = str(text).partition(":")
                assert name == end.name
                spans.append([int(size) for size in shape.split("x")])
                assert all(one in (None, size) for one, size in zip(sizes, spans[-1], strict=True))
            assert all(low <= usual <= high for low, usual, high in zip(*spans, strict=True))
            self.spans[end.name] = spans

    def _dump(self) -> None:
        if self.runtime.writes_nothing:
            return
        header = json.dumps({"version": self.runtime.version, "spans": self.spans}).encode()
        graph = self.proto.graph
        node = helper.make_node(
            "EPContext",
            [one.name for one in graph.input],
            [one.name for one in graph.output],
            domain="com.microsoft",
            embed_mode=1,
            ep_cache_context=MAGIC + header + b"\n" + self.proto.SerializeToString(),
            hardware_architecture="90",
        )
        model = helper.make_model(helper.make_graph([node], "context", graph.input, graph.output))
        onnx.save_model(model, self.options["trt_ep_context_file_path"])

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        if self.runtime.run_failure is not None:
            raise RuntimeError(self.runtime.run_failure)
        for name, value in inputs.items():
            if name in self.spans:
                least, _, most = self.spans[name]
                assert all(a <= b <= c for a, b, c in zip(least, value.shape, most, strict=True)), value.shape
        rows = self.inner.run(names, inputs)
        if not self.is_engine and self.spans:
            self._dump()
        return rows

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.runtime.falls_back else [PROVIDER, "CPUExecutionProvider"]

    def disable_fallback(self) -> None:
        pass

    def get_inputs(self) -> Any:
        return self.inner.get_inputs()

    def get_outputs(self) -> Any:
        return self.inner.get_outputs()

    def get_modelmeta(self) -> Any:
        entries = {one.key: one.value for one in self.proto.metadata_props}
        return type("ModelMetadata", (), {"custom_metadata_map": entries})


def install(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Puts the stand-in in place of ONNX Runtime; other providers stay as they are."""
    runtime = Runtime()

    def opened(path: Any, settings: object = None, *, providers: list[Any]) -> Any:
        if providers[0][0] == PROVIDER:
            return Session(runtime, path, settings, providers)
        return _open(path, settings, providers=providers)

    names = [PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    return runtime
