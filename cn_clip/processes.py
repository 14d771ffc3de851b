"""Facts of processes: their memory and cores, and what children of a fork lack."""

import ctypes
import functools
import os
import sys
import weakref
from pathlib import Path
from typing import Any

_HELD: "weakref.WeakSet[object]" = weakref.WeakSet()
_computes_alone = False


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


def usable_cores() -> int:
    """Cores that this process may run on, which are fewer than the machine's where it was given only some."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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


@functools.cache
def compute_alone_in_children() -> None:
    """Makes PyTorch compute with one thread in children that `os.fork` makes from now on.

    They lack the other threads, and work handed to those waits for ever. Does nothing where processes cannot fork.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    global _computes_alone
    import torch

    torch.set_num_threads(1)
    _computes_alone = True


def computes_alone() -> bool:
    """Whether this process is a child in which PyTorch must compute with one thread."""
    return _computes_alone


def hold_in_children(owner: object) -> None:
    """Keeps `owner`, and what it refers to, from being freed in children that `os.fork` makes.

    For what has threads of its own: the children lack them, and freeing it would wait for them to end.
    """
    _HELD.add(owner)


def _hold() -> None:
    for owner in _HELD:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))  # never given back, not even when the interpreter ends


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hold)
