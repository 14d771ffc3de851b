"""Other processes: which one a temporary file belongs to, whether it still runs, and what children of a fork lack."""

import ctypes
import functools
import os
import platform
import re
import weakref

_HELD: "weakref.WeakSet[object]" = weakref.WeakSet()
_computes_alone = False


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
    _hold_at_fork()
    _HELD.add(owner)


@functools.cache
def _hold_at_fork() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_hold)


def _hold() -> None:
    for owner in _HELD:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))  # never given back, not even when the interpreter ends
