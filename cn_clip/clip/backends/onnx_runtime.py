"""Exported towers in ONNX Runtime, on the processor or through CUDA or TensorRT."""

import contextlib
import functools
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import ranks
from cn_clip.clip.backends.base import Pixels, TokenIds, TowerFacts
from cn_clip.clip.backends.names import Kind, Precision
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
from cn_clip.language import both
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

        Raises what `open_session` raises; CheckpointError for a file that is no tower of this kind.
        """
        self._take(path, kind, open_session(path, device, num_threads=num_threads))

    def _take(self, path: str | Path, kind: Kind, session: Any) -> None:
        self.path, self._session = str(path), session
        self.provider: str = session.get_providers()[0]
        self.on_gpu = self.provider != PROVIDERS["cpu"]
        with reading_facts(self.path):
            inputs = {one.name: _shape(one.shape) for one in session.get_inputs()}
            outputs = {one.name: _shape(one.shape) for one in session.get_outputs()}
            metadata = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        self.facts: TowerFacts = facts_of(self.path, kind, inputs=inputs, outputs=outputs, metadata=metadata)
        self._input, self._output = INPUTS[kind], OUTPUTS[kind]
        self._type = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else None
        runtime: Any = require("onnxruntime", extra="onnx", purpose="the onnx backend")
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


def open_session(
    path: str | Path,
    device: str | None,
    *,
    num_threads: int | None = None,
    options: Mapping[str, str] | None = None,
    otherwise: str = 'use device="cpu"',
) -> Any:
    """An `onnxruntime.InferenceSession` of a file on a device: cpu, cuda, cuda:N, tensorrt or tensorrt:N.

    options: of the device's provider, besides the device itself. otherwise: what to do if the device fails.
    Raises ConfigError when ONNX Runtime has no such provider here, or would compute elsewhere; CheckpointError when
    the file cannot be opened; MissingExtraError without `onnxruntime`.
    """
    runtime: Any = require("onnxruntime", extra="onnx", purpose="the onnx backend")
    provider, chosen = _provider(runtime, device, options or {})
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3  # errors only; they come as exceptions too
    if not ranks.processor()[1] & VNNI:
        settings.add_session_config_entry(EXACT_INT8, "1")
    if num_threads is not None:
        settings.intra_op_num_threads = num_threads
    missing = missing_weights(path)
    if missing:
        raise CheckpointError(missing)
    weights = _given_weights(settings, Path(path))
    try:
        with contextlib.nullcontext() if provider == PROVIDERS["cpu"] else contextlib.redirect_stdout(io.StringIO()):
            session = runtime.InferenceSession(str(path), settings, providers=chosen)
    except Exception as error:  # its errors have no common type, and no fixed wording
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise not_opened(str(path), f"ONNX Runtime on {device or 'auto'}", reason, error) from error
    del weights  # the session has copied them
    hold_in_children(session)
    used = session.get_providers()[0]
    if used != provider:
        if device not in (None, "auto"):
            raise ConfigError(
                f"device: {provider} was asked for, but ONNX Runtime fell back to {used}; its log says why, "
                f"a missing CUDA, cuDNN or TensorRT library as a rule; or {otherwise}"
            )
        say_fallen_back(provider)
    session.disable_fallback()
    return session


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
    print(
        both(f"{provider} 用不了，改在 CPU 上计算", f"{provider} cannot be used here; computing on the CPU"),
        file=sys.stderr,
    )


def check_device(device: str | None) -> None:
    """Raises ConfigError for a device that there is not, or that ONNX Runtime here is not built for."""
    _provider(require("onnxruntime", extra="onnx", purpose="the onnx backend"), device, {})


def native_precisions(device: str | None) -> tuple[Precision, ...]:
    """What a device multiplies in hardware, of what keeps its cosine; raises as `check_device`."""
    provider, _ = _provider(require("onnxruntime", extra="onnx", purpose="the onnx backend"), device, {})
    return ("fp32",) if provider == PROVIDERS["cpu"] else ("fp16", "fp32")


def _provider(runtime: Any, device: str | None, given: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The provider of a device, and what to ask ONNX Runtime for: it, with the given options, and those it needs."""
    available = runtime.get_available_providers()
    if device in (None, "auto"):
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    name, _, number = device.partition(":")
    if name not in PROVIDERS or (number and not (name != "cpu" and number.isdigit())):
        raise ConfigError(f"device: the onnx backend runs on cpu, cuda, cuda:N or tensorrt, got {device!r}")
    provider = PROVIDERS[name]
    if provider not in available:
        raise ConfigError(
            f"device: this ONNX Runtime has no {provider}, only {', '.join(available)}; "
            "use --device cpu, or install the build for GPUs: pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    where = {"device_id": number} if number else {}
    exact = {"use_tf32": "0"} if name == "cuda" else {}  # float32 is float32
    chosen: list[Any] = [(provider, {**exact, **where, **given})]
    if name == "tensorrt":
        chosen.append((PROVIDERS["cuda"], where) if where else PROVIDERS["cuda"])
    return provider, chosen if name == "cpu" else [*chosen, PROVIDERS["cpu"]]


def _shape(shape: list[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)
