"""Which process a temporary file belongs to, by its name, and whether it still runs."""

import os
import platform
import re


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
