"""How fast backends and precisions are on each kind of processor: what `--backend auto` goes by; imports nothing heavy.

The speeds are those of docs/benchmarks.md, times the reference (cn_clip 1.6.0, float32) on the same machine, ViT-B-16
and RoBERTa-base. They are a table rather than a measurement at first use, because to measure a backend its model must
be exported: minutes and gigabytes for what would not be taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from cn_clip.clip.backends.names import BackendName, Precision
from cn_clip.ranks import ProcessorKind

DeviceKind: TypeAlias = ProcessorKind | Literal["gpu"]


class Mode(NamedTuple):
    """What computes, and in what."""

    backend: BackendName
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """Times the reference, pictures and texts, by mode. processor: on what."""

    processor: str
    speeds: Mapping[Mode, tuple[float, float]]

    @property
    def order(self) -> tuple[Mode, ...]:
        """The fastest first, by the product of both speeds: 2 × pictures is worth 2 × texts."""
        return tuple(sorted(self.speeds, key=lambda mode: -self.speeds[mode][0] * self.speeds[mode][1]))


MEASURED: dict[DeviceKind, Measured] = {
    "avx512-bf16": Measured(
        "AMD EPYC (Zen 4), 2 cores",
        {
            Mode("openvino", "int8"): (7.1, 24.9),
            Mode("openvino", "bf16"): (5.4, 19.0),
            Mode("onnx", "int8"): (3.7, 13.1),
            Mode("torch", "bf16"): (3.2, 16.0),
            Mode("openvino", "fp32"): (2.8, 9.9),
            Mode("onnx", "fp32"): (2.4, 9.2),
            Mode("torch", "fp32"): (1.1, 4.9),
        },
    ),
    "avx2": Measured(
        "AVX2 alone, 2 cores",
        {
            Mode("onnx", "int8"): (2.03, 8.4),
            Mode("openvino", "fp32"): (1.44, 5.9),
            Mode("onnx", "fp32"): (1.44, 5.8),
            Mode("openvino", "int8"): (1.42, 4.7),
            Mode("torch", "fp32"): (1.10, 5.1),
        },
    ),
}
_FLOAT32 = (Mode("openvino", "fp32"), Mode("onnx", "fp32"), Mode("torch", "fp32"))
_VNNI = (Mode("openvino", "int8"), Mode("onnx", "int8"), *_FLOAT32)
# Kinds that have not been measured: the order expected of their arithmetic. What cannot be computed in is left out.
EXPECTED: dict[DeviceKind, tuple[Mode, ...]] = {
    "amx": MEASURED["avx512-bf16"].order,
    "avx512-vnni": _VNNI,
    "avx2-vnni": (Mode("onnx", "int8"), Mode("openvino", "int8"), *_FLOAT32),
    "avx512": MEASURED["avx2"].order,
    "arm64": (Mode("onnx", "int8"), Mode("onnx", "fp32"), Mode("openvino", "fp32"), Mode("torch", "fp32")),
    "other": _FLOAT32,
    # Nothing but PyTorch was measured on a GPU.
    "gpu": (Mode("torch", "bf16"), Mode("torch", "fp16"), Mode("torch", "fp32")),
}
# What people call a kind.
NAMES: dict[DeviceKind, str] = {
    "amx": "AMX",
    "avx512-bf16": "AVX-512 BF16",
    "avx512-vnni": "AVX-512 VNNI",
    "avx2-vnni": "AVX2 VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "arm64": "ARM64",
    "other": "?",
    "gpu": "GPU",
}


def order(kind: DeviceKind) -> tuple[Mode, ...]:
    """The modes worth trying on a kind of device, the fastest first; float32 in PyTorch, which is everywhere, last."""
    found = MEASURED[kind].order if kind in MEASURED else EXPECTED[kind]
    last = Mode("torch", "fp32")
    return (*(mode for mode in found if mode != last), last)
