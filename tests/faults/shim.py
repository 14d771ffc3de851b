"""Builds and loads `shim.c`: kills and errors of the system at a chosen call. Only where there is a C compiler."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

WRITES, SYNCS, NAMES, READS = 1, 2, 4, 8
CHANGES = WRITES | SYNCS | NAMES
_LOADED = "CN_CLIP_FAULTS_SHIM"
# What happens on disks: the calls that fail, with what, and whether all later ones fail too.
FAULTS = {
    "full": (WRITES, errno.ENOSPC, True),
    "full for a moment": (WRITES, errno.ENOSPC, False),
    "over the quota": (WRITES | NAMES, errno.EDQUOT, True),
    "read-only": (CHANGES, errno.EROFS, True),
    "broken": (CHANGES | READS, errno.EIO, False),
    "broken for good": (CHANGES | READS, errno.EIO, True),
    "no right": (NAMES, errno.EACCES, False),
}


def load_before_all() -> None:
    """Starts this program again with the shim loaded, if it can be built; says so if it cannot."""
    if _LOADED in os.environ or sys.platform != "linux":
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        print("no C compiler: no aimed kills, no faults of the disk", flush=True)
        return
    library = Path(tempfile.mkdtemp(prefix="faults-shim-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), _LOADED: str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def is_loaded() -> bool:
    """Whether calls can be counted, and made to fail."""
    return _LOADED in os.environ


def arm(folder: Path, which: int, at: int, *, error: int = 0, after: bool = False, lasting: bool = False) -> None:
    """From now on the `at`-th call of these classes below `folder` fails with `error`, or kills this process (0)."""
    _library().faults_arm(os.fsencode(folder), which, at, error, after, lasting)


def seen() -> int:
    """Calls since `arm`."""
    return int(_library().faults_seen())


@cache
def _library() -> Any:
    library = ctypes.CDLL(None)
    library.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long, *[ctypes.c_int] * 3)
    library.faults_seen.restype = ctypes.c_long
    return library
