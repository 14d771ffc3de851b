"""Where this process runs: device, mixed precision type, rank among its peers."""

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process, 0 when it is alone. Source: RANK, set by torchrun."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes. Source: WORLD_SIZE, set by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine. Source: LOCAL_RANK, set by torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_device(name: str = "auto") -> "torch.device":
    """The named device, or with "auto" the best there is: CUDA, then MPS, then CPU.

    Plain "cuda" is the device of this process's number on its machine.
    Raises ConfigError when the named device is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise ConfigError(f"device: {name} was asked for, but PyTorch finds none here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} was asked for, but there are {torch.cuda.device_count()} GPUs; the first is 0"
        )
    return torch.device("cuda", local_rank()) if name == "cuda" and world_size() > 1 else device


def autocast_dtype(precision: str, device: "torch.device") -> "torch.dtype | None":
    """The type of mixed precision arithmetic, None for none.

    "amp" is float16 on CUDA, as in Chinese-CLIP; elsewhere bfloat16 where the processor multiplies it natively.
    """
    import torch

    if precision == "bf16":
        return torch.bfloat16
    if precision != "amp":
        return None
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None


def cpu_has_bf16() -> bool:
    """Whether bfloat16 products run in hardware (AVX-512 BF16 or AMX)."""
    flags = processor()[1]
    if flags:
        return bool(flags & {"avx512_bf16", "amx_bf16"})
    import torch

    # Private functions, absent on some builds.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks: list[Callable[[], bool]] = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return any(check() for check in checks)


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
