"""Facts of processes: to which one a temporary file belongs, whether it still runs, how much memory this one took."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any


def host_name() -> str:
    """This machine, for a file name: letters, digits, "_" and "."."""
    return re.sub(r"[^\w.]", "_", platform.node()) or "host"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True on Windows, where it cannot be asked."""
    if os.name == "nt":  # there, signal 0 would reach the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def peak_bytes() -> int:
    """The most memory that was resident in this process so far, in bytes; 0 where the system does not say it.

    On Linux from /proc: `ru_maxrss` begins there with the memory of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return _windows_peak_bytes()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        *((f"other_{number}", ctypes.c_size_t) for number in range(7)),
    )


def _windows_peak_bytes() -> int:
    library: Any = getattr(ctypes, "WinDLL", None)
    if library is None:
        return 0
    kernel: Any = library("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.POINTER(_MemoryCounters), ctypes.c_uint32)
    counters = _MemoryCounters(size=ctypes.sizeof(_MemoryCounters))
    found = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size)
    return int(counters.peak_working_set) if found else 0
