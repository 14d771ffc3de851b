"""Exported towers in OpenVINO, the fastest backend on most processors."""

import os
import threading
from functools import cache
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
    reading_facts,
)
from cn_clip.errors import CheckpointError, ConfigError, lacked_memory
from cn_clip.extras import require
from cn_clip.processes import hold_in_children

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
CAPABILITIES: dict[Precision, str] = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
# Values of a row that share one scale when activations are turned into int8 on the way. Measured on ViT-B-16 with
# AVX-512 VNNI: 32 is a fifth slower than 128, a whole row is not faster than bfloat16 and loses more.
GROUP_SIZE = 128


class OpenVinoTower:
    """One ONNX file in OpenVINO, on the processor."""

    provider, on_gpu = "", False

    def __init__(
        self, path: str | Path, kind: Kind, *, precision: Precision = "fp32", num_threads: int | None = None
    ) -> None:
        """precision: what is computed in; int8 wants a file whose weights are int8. num_threads: default one a core.

        Raises ConfigError for a precision this processor lacks; CheckpointError when the file cannot be opened or is no
        tower of this kind; MissingExtraError without `openvino`.
        """
        core = _core()
        self.path = str(path)
        core.set_property({"ENABLE_MMAP": False})  # rows must not change, nor the process end, when a file is written
        settings = settings_for(capabilities(), precision)
        if num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(num_threads)
        missing = missing_weights(path)
        if missing:
            raise CheckpointError(missing)
        try:
            model = core.read_model(self.path)
            self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:  # RuntimeErrors of many lines
            raise not_opened(self.path, "OpenVINO", _last_line(error), error) from error
        hold_in_children(self)
        self._alone = threading.Lock()
        with reading_facts(self.path):
            inputs = {one.get_any_name(): _shape(one) for one in model.inputs}
            outputs = {one.get_any_name(): _shape(one) for one in model.outputs}
            is_ours = model.has_rt_info(["framework", METADATA_KEY])
            metadata = model.get_rt_info(["framework", METADATA_KEY]).astype(str) if is_ours else None
        self.facts: TowerFacts = facts_of(self.path, kind, inputs=inputs, outputs=outputs, metadata=metadata)
        self._input, self._output = INPUTS[kind], OUTPUTS[kind]

    def run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        """A batch to features (B, D), not scaled to unit length; threads take turns.

        Raises CheckpointError for a batch of a shape or type that the file does not take, ConfigError in a child of
        `os.fork`.
        """
        # Copies, unless told to share the memory that the next batch overwrites.
        _refuse_in_forked_child()
        with self._alone:  # a request computes one batch at a time
            try:
                features: NDArray[np.floating] = self._request.infer({self._input: inputs})[self._output]
            except RuntimeError as error:
                if lacked_memory(error):
                    raise
                raise not_taken(self.path, inputs, _last_line(error)) from error
        return features


def _last_line(error: Exception) -> str:
    """What OpenVINO says after the lines of its source."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), "")


@cache
def capabilities() -> list[str]:
    """What OpenVINO computes in on this processor, in its own words; raises MissingExtraError without `openvino`."""
    found: list[str] = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found


def native_precisions() -> tuple[Precision, ...]:
    """What this processor multiplies in hardware, of what keeps its cosine.

    OpenVINO computes in bfloat16 with plain AVX-512 too, by way of float32, which is not faster.
    """
    flags = ranks.processor()[1]
    has_bf16 = "BF16" in capabilities() and (not flags or ranks.cpu_has_bf16())
    return ("bf16", "fp32") if has_bf16 else ("fp32",)


def _core() -> Any:
    vino: Any = require("openvino", extra="openvino", purpose="the openvino backend")
    _refuse_in_forked_child()
    return vino.Core()


@cache
def _first_process() -> int:
    """The process that used OpenVINO first; a child of `os.fork` remembers that of its parent."""
    return os.getpid()


def _refuse_in_forked_child() -> None:
    """Raises ConfigError in a child of a process that has used OpenVINO: its threads are missing there.

    Most computations would succeed, and one in hundreds would wait for them for ever.
    """
    if _first_process() != os.getpid():
        raise ConfigError(
            "openvino: this process was forked from one that has used OpenVINO, which may wait for ever here; "
            'start processes by "spawn" or "forkserver", or use the onnx backend'
        )


def settings_for(capabilities: list[str], precision: Precision) -> dict[str, str]:
    """What OpenVINO is told, given what a processor computes in; raises ConfigError for a precision it lacks."""
    if CAPABILITIES[precision] not in capabilities:
        known = [name for name, capability in CAPABILITIES.items() if capability in capabilities]
        raise ConfigError(
            f"precision: this processor does not compute in {precision}; use auto, or one of {', '.join(known)}"
        )
    # One request at a time, over all cores.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS.get(precision, "f32")}
    if precision == "int8":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(GROUP_SIZE)
        if "BF16" in capabilities:  # for all that is not a product with quantised weights
            settings["INFERENCE_PRECISION_HINT"] = "bf16"
    return settings


def _shape(port: Any) -> tuple[int | None, ...]:
    return tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
