"""Where this process runs: device, mixed precision type, rank among its peers."""

import contextlib
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from cn_clip.errors import ConfigError
from cn_clip.processes import computes_alone

if TYPE_CHECKING:
    import torch

# Kinds of processors that differ in which arithmetic is fast: each has what the next lacks. `arm64` multiplies int8.
ProcessorKind: TypeAlias = Literal["amx", "avx512-bf16", "avx512-vnni", "avx2-vnni", "avx512", "avx2", "arm64", "other"]
PROCESSOR_KINDS: tuple[ProcessorKind, ...] = get_args(ProcessorKind)
# What /proc/cpuinfo lists of a kind, in that order; of "other" nothing.
_FLAGS_OF_KINDS = ("amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp")
# How PyTorch tells of the same where there is no /proc/cpuinfo: private functions, absent on some builds.
_FLAGS_IN_TORCH = {
    "_is_amx_tile_supported": {"amx_int8", "amx_bf16"},
    "_is_avx512_bf16_supported": {"avx512_bf16"},
    "_is_vnni_supported": {"avx512_vnni"},
    "_is_avx512_supported": {"avx512f"},
    "_is_avx2_supported": {"avx2"},
}


def rank() -> int:
    """Number of this process, 0 when it is alone. Source: RANK, set by torchrun."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes. Source: WORLD_SIZE, set by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine. Source: LOCAL_RANK, set by torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine. Source: LOCAL_WORLD_SIZE, set by torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_device(device: "str | torch.device | None" = "auto") -> "torch.device":
    """The device to compute on. One of CUDA always has its index: `torch.cuda.set_device` and others insist on it.

    None: CUDA if there is one, else the CPU, as Chinese-CLIP chooses. "auto": the same, but MPS before the CPU.
    "cuda" without an index: PyTorch's current device.
    Raises ConfigError for what is not a device, or one that this machine does not have.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None or device == "auto":
        device = "cuda" if available["cuda"] else "mps" if device and available["mps"] else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {device!r}") from error
    if not available.get(chosen.type, True):
        raise ConfigError(f"device: {chosen} was asked for, but PyTorch finds none here; use --device cpu")
    if chosen.type != "cuda":
        return chosen
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {chosen} was asked for, but there are {torch.cuda.device_count()} GPUs; the first is cuda:0"
        )
    return torch.device("cuda", index)


def own_device(name: str = "auto") -> "torch.device":
    """The device of this process among those that torchrun started: on CUDA the one with its number on its machine.

    Raises ConfigError as `choose_device`, for "cuda:N" with several processes, and for more processes than GPUs.
    """
    import torch

    if world_size() == 1 or not torch.cuda.is_available() or not name.startswith(("auto", "cuda")):
        return choose_device(name)
    if name not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {name}: names one GPU for {world_size()} processes; use --device cuda, which gives each process "
            "its own, and choose among the GPUs of this machine with CUDA_VISIBLE_DEVICES"
        )
    # Not choose_device("cuda"): asking for the current device takes memory of the first GPU for every process.
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank()}, but this process sees {torch.cuda.device_count()} GPUs; start no more "
            "processes on a machine than it has GPUs (torchrun --nproc-per-node), and let each see all of them "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", local_rank())


def use_threads(count: int | None) -> None:
    """Sets PyTorch's threads for the whole process, None leaves them as they are.

    In a forked child that must compute with one it warns instead: more would wait for ever.
    """
    import torch

    if count is None:
        return
    if count > 1 and computes_alone():
        warnings.warn(
            f"num_threads {count}: this process was forked from one that had opened a model, and computes with one "
            "thread; start processes with spawn or forkserver to have more",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    torch.set_num_threads(count)


def autocast_dtype(precision: str, device: "torch.device") -> "torch.dtype | None":
    """The type of mixed precision arithmetic, None for none.

    "amp" is float16 on CUDA, as in Chinese-CLIP; elsewhere bfloat16 where the processor multiplies it natively.
    "auto" is bfloat16 on CUDA that multiplies it natively, which needs no scaling of gradients; else what "amp" is.
    """
    import torch

    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and gpu_has_bf16(device) else "amp"
    if precision == "bf16":
        return torch.bfloat16
    if precision != "amp":
        return None
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None


def gpu_has_bf16(device: "torch.device") -> bool:
    """Whether a device of CUDA multiplies bfloat16 in hardware: NVIDIA's from Ampere on."""
    import torch

    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def computes_in_tf32(device: "torch.device", *, is_strict: bool) -> bool:
    """Whether float32 products are TF32 after `set_float32_products`: from Ampere on, unless strict."""
    import torch

    if device.type != "cuda" or is_strict or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def set_float32_products(device: "torch.device", *, is_strict: bool) -> None:
    """On CUDA: products of float32 matrices and convolutions are TF32, or where `is_strict` in full, in this process.

    TF32 keeps 10 of 23 bits of each factor's fraction and sums in float32. For commands, as a program that uses the
    library has PyTorch's settings for its own.
    """
    import torch

    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if is_strict else "high")
        torch.backends.cudnn.allow_tf32 = not is_strict


class _FullFloat32:
    """PyTorch has one setting for the process: it is put back when the last of several threads has left."""

    def __init__(self) -> None:
        self._lock, self._num_inside, self._before = threading.Lock(), 0, ""

    @contextlib.contextmanager
    def __call__(self, device: "torch.device") -> Iterator[None]:
        import torch

        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    torch.set_float32_matmul_precision(self._before)


# With full_float32(device): float32 products inside are not rounded to a smaller type, whatever the caller has set.
full_float32 = _FullFloat32()


def cpu_has_bf16() -> bool:
    """Whether bfloat16 products run in hardware (AVX-512 BF16 or AMX)."""
    return bool(instructions() & {"avx512_bf16", "amx_bf16"})


def processor_kind() -> ProcessorKind:
    """The first of the kinds whose arithmetic this processor has; "other" where nobody tells."""
    known = instructions()
    found = (kind for kind, flag in zip(PROCESSOR_KINDS[:-1], _FLAGS_OF_KINDS, strict=True) if flag in known)
    return next(found, "other")


def instructions() -> set[str]:
    """What this processor can do, in the words of /proc/cpuinfo; elsewhere of that what PyTorch tells."""
    flags = processor()[1]
    if flags:
        return flags
    if platform.machine().lower() in ("arm64", "aarch64"):
        return {"asimddp"} if platform.system() == "Darwin" else set()  # all of Apple's own multiply int8
    import torch

    checks: dict[str, Callable[[], bool]] = {
        name: getattr(torch.cpu, name) for name in _FLAGS_IN_TORCH if hasattr(torch.cpu, name)
    }
    return {flag for name, check in checks.items() if check() for flag in _FLAGS_IN_TORCH[name]}


@cache
def processor() -> tuple[str, set[str]]:
    """Its name and what it can do, as Linux tells them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip().lower(), value.strip())
    name = values.get("model name") or platform.processor() or platform.machine()
    return name, set((values.get("flags") or values.get("features") or "").split())
