"""Exported towers in ONNX Runtime, on the processor or through CUDA or TensorRT."""

import contextlib
import functools
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import ranks
from cn_clip.clip.backends.base import Kind, Pixels, Precision, TokenIds, TowerFacts
from cn_clip.clip.backends.onnx_files import (
    INPUTS,
    METADATA_KEY,
    OUTPUTS,
    facts_of,
    missing_weights,
    not_opened,
    not_taken,
    outside_files,
    reading_facts,
)
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.extras import require
from cn_clip.processes import hold_in_children

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


# Without it, int8 products overflow on x86 processors that have no VNNI; where they have it, it only costs time.
EXACT_INT8 = "session.x64quantprecision"
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


class OnnxTower:
    """One ONNX file in ONNX Runtime. `provider` is the one in use."""

    def __init__(
        self, path: str | Path, kind: Kind, *, device: str | None = None, num_threads: int | None = None
    ) -> None:
        """device: cpu, cuda, cuda:N or tensorrt; default: cuda where it works. num_threads: default one a core.

        Raises ConfigError when ONNX Runtime has no such provider here, or would compute elsewhere; CheckpointError when
        the file cannot be opened or is no tower of this kind; MissingExtraError without `onnxruntime`.
        """
        runtime: Any = require("onnxruntime", extra="onnx", purpose="the onnx backend")
        self.path = str(path)
        self.provider, chosen = _provider(runtime, device)
        self.on_gpu = self.provider != PROVIDERS["cpu"]
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3  # errors alone; they come as exceptions too
        if not ranks.processor()[1] & VNNI:
            settings.add_session_config_entry(EXACT_INT8, "1")
        if num_threads is not None:
            settings.intra_op_num_threads = num_threads
        missing = missing_weights(path)
        if missing:
            raise CheckpointError(missing)
        weights = _given_weights(settings, Path(path))
        try:
            with contextlib.redirect_stdout(io.StringIO()) if self.on_gpu else contextlib.nullcontext():
                self._session = runtime.InferenceSession(self.path, settings, providers=chosen)
        except Exception as error:  # its errors have no common type, and no fixed wording
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise not_opened(self.path, f"ONNX Runtime on {device or 'auto'}", reason, error) from error
        del weights  # the session has copied them
        hold_in_children(self)
        used = self._session.get_providers()[0]
        if used != self.provider:
            if device not in (None, "auto"):
                raise ConfigError(
                    f"device: {self.provider} was asked for, but ONNX Runtime fell back to {used}; its log says why, "
                    'a missing CUDA, cuDNN or TensorRT library as a rule; or use device="cpu"'
                )
            say_fallen_back(self.provider)
            self.provider, self.on_gpu = used, False
        self._session.disable_fallback()
        with reading_facts(self.path):
            inputs = {one.name: _shape(one.shape) for one in self._session.get_inputs()}
            outputs = {one.name: _shape(one.shape) for one in self._session.get_outputs()}
            metadata = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        self.facts: TowerFacts = facts_of(self.path, kind, inputs=inputs, outputs=outputs, metadata=metadata)
        self._input, self._output = INPUTS[kind], OUTPUTS[kind]
        self._type = np.float16 if self._session.get_inputs()[0].type == "tensor(float16)" else None
        self._misfit: type[Exception] = runtime.capi.onnxruntime_pybind11_state.InvalidArgument

    def run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        """A batch to features (B, D) of the type of the file, not scaled to unit length.

        Raises CheckpointError for a batch of a shape or type that the file does not take.
        """
        fed = inputs if self._type is None else inputs.astype(self._type)
        try:
            features: NDArray[np.floating] = self._session.run([self._output], {self._input: fed})[0]
        except self._misfit as error:
            raise not_taken(self.path, fed, str(error).splitlines()[0]) from error
        return features


def _given_weights(settings: Any, path: Path) -> list[NDArray[np.uint8]]:
    """Outside weights, read here: ONNX Runtime would map their files, and give other rows once these are written.

    Older versions than 1.23 cannot be given them; there a file must be replaced, not written over. The result is to be
    kept until the session is made.
    """
    names = outside_files(path)
    give = getattr(settings, "add_external_initializers_from_files_in_memory", None)
    if not names or give is None:
        return []
    weights = [np.fromfile(path.parent / name, np.uint8) for name in names]
    give(names, weights, [len(one) for one in weights])
    return weights


@functools.cache
def say_fallen_back(provider: str) -> None:
    """Says on stderr, once a process, that a GPU cannot be used although ONNX Runtime is built for it."""
    print(f"{provider} 用不了，改在 cpu 上计算 / {provider} cannot be used here; computing on cpu", file=sys.stderr)


def check_device(device: str | None) -> None:
    """Raises ConfigError for a device that there is not, or that ONNX Runtime here is not built for."""
    _provider(require("onnxruntime", extra="onnx", purpose="the onnx backend"), device)


def native_precisions(device: str | None) -> tuple[Precision, ...]:
    """What a device multiplies in hardware, of what keeps its cosine; raises as `check_device`."""
    provider, _ = _provider(require("onnxruntime", extra="onnx", purpose="the onnx backend"), device)
    return ("fp32",) if provider == PROVIDERS["cpu"] else ("fp16", "fp32")


def _provider(runtime: Any, device: str | None) -> tuple[str, list[Any]]:
    """The provider of a device, and what to ask ONNX Runtime for: it and those it leans on."""
    available = runtime.get_available_providers()
    if device in (None, "auto"):
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    name, _, number = device.partition(":")
    if name not in PROVIDERS or (number and not (name == "cuda" and number.isdigit())):
        raise ConfigError(f"device: the onnx backend runs on cpu, cuda, cuda:N or tensorrt, got {device!r}")
    provider = PROVIDERS[name]
    if provider not in available:
        raise ConfigError(
            f"device: this ONNX Runtime has no {provider}, only {', '.join(available)}; "
            "use --device cpu, or install the build for GPUs: pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    options = {"use_tf32": "0"} if name == "cuda" else {}  # float32 is float32
    if number:
        options["device_id"] = number
    leaned_on = {"cpu": [], "cuda": ["cpu"], "tensorrt": ["cuda", "cpu"]}[name]
    return provider, [(provider, options), *(PROVIDERS[one] for one in leaned_on)]


def _shape(shape: list[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)
