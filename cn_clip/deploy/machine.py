"""What a measurement was made on: processor, cores, versions."""

import datetime
import os
import platform
from importlib import metadata
from typing import Any

from cn_clip import ranks

PACKAGES = ("cn_clip", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
# What fast low precision on x86 and ARM needs.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16")


def facts() -> dict[str, Any]:
    """Processor, cores this process may use, instructions, OMP_NUM_THREADS, system, versions and the time (UTC)."""
    processor, flags = ranks.processor()
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
