"""What a measurement was made on: processor, cores, versions."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("cn_clip", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
# What fast low precision on x86 and ARM needs.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16")


def facts() -> dict[str, Any]:
    """Processor, cores this process may use, instructions, OMP_NUM_THREADS, system, versions and the time (UTC)."""
    processor, flags = _processor()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": processor,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> tuple[str, set[str]]:
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
