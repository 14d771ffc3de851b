"""The backends by name, and what each computes in; imports nothing heavy, for the options of commands."""

import numbers
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from cn_clip import ranks, spelling, zoo
from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch

Kind: TypeAlias = Literal["image", "text"]
BackendName: TypeAlias = Literal["torch", "onnx", "openvino", "tensorrt"]
BackendChoice: TypeAlias = Literal["auto", "torch", "onnx", "openvino", "tensorrt"]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
PrecisionChoice: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "int8"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
KINDS: tuple[Kind, ...] = get_args(Kind)
# What each backend computes in; the machine may lack some of it.
PRECISIONS: dict[BackendName, tuple[Precision, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt": ("fp16", "fp32"),
}
# What precision "auto" takes of a named backend: the first that the device multiplies in hardware. All keep a cosine of
# 0.999 to float32 (measured on ViT-B-16: bf16 0.9998, docs/benchmarks.md). int8 is faster, and not for every model as
# close: it wants to be named, or measured, as backend "auto" does. On a GPU bf16 is as fast as fp16, and nothing
# overflows in it.
FASTEST: dict[BackendName, tuple[Precision, ...]] = {
    "torch": ("bf16", "fp16", "fp32"),
    "onnx": ("fp16", "fp32"),
    "openvino": ("bf16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}


# The smallest cosine to float32 that "auto" allows: what it has always promised. Measured on ViT-B-16 with random
# weights bf16 has 0.9998 and int8 0.9992, and on trained models int8 has 0.9998 and moves recall by at most half a
# point (docs/benchmarks.md); a model that int8 suits worse falls back to a higher precision.
LEAST_COSINE = 0.999

DEFAULT_CONTEXT_LENGTH = zoo.CONTEXT_LENGTH


def check_precision(backend: BackendChoice, precision: str) -> PrecisionChoice:
    """`precision` as a type; raises ConfigError for a backend or a precision it does not have."""
    if backend != "auto" and backend not in PRECISIONS:
        choices = ("auto", *BACKENDS)
        hint = spelling.meant(str(backend), choices)
        raise ConfigError(f"backend: expected one of {list(choices)}, got {backend!r}{hint}")
    known: tuple[PrecisionChoice, ...] = get_args(PrecisionChoice)
    if backend != "auto":
        known = (*PRECISIONS[backend], "auto")
    for name in known:
        if precision == name:
            return name
    if backend == "auto":
        raise ConfigError(f"precision: expected one of {list(known)}, got {precision!r}")
    raise ConfigError(f"precision: the {backend} backend computes in {' or '.join(known)}, got {precision!r}")


def settled(backend: BackendName, precision: str, native: Collection[Precision]) -> Precision:
    """`precision`, or for "auto" the fastest of those in `native`, what the device multiplies in hardware.

    Raises what `check_precision` raises.
    """
    chosen = check_precision(backend, precision)
    return next(one for one in FASTEST[backend] if one in native) if chosen == "auto" else chosen


def torch_precisions(device: "torch.device") -> tuple[Precision, ...]:
    """What a device of PyTorch multiplies in hardware, of what keeps its cosine."""
    if device.type == "cuda":
        return ("bf16", "fp16", "fp32") if ranks.gpu_has_bf16(device) else ("fp16", "fp32")
    return ("bf16", "fp32") if device.type == "cpu" and ranks.cpu_has_bf16() else ("fp32",)


def check_cosine(least: object, name: str = "min_cosine") -> None:
    """Raises ConfigError, calling it `name`, for a bound on the cosine to float32 that cannot be; None is one."""
    is_number = isinstance(least, numbers.Real) and not isinstance(least, bool)
    if least is not None and not (is_number and 0 < least <= 1):  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a cosine above 0 and at most 1, got {least!r}")


def check_threads(count: object, *, least: int = 1) -> None:
    """Raises ConfigError for a number of threads that cannot be; None is one."""
    is_number = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if count is not None and not (is_number and count >= least):  # type: ignore[operator]
        raise ConfigError(f"num_threads: expected a whole number of at least {least}, got {count!r}")
