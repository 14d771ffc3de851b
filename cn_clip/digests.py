"""What is known of a file before it is parsed: whether it is there, and whether it holds what was written."""

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cn_clip.errors import DataError, UnreadableError, is_absent
from cn_clip.files import atomic_write

# Beside the files that it names: their sizes, times, inodes and digests when they were last found whole.
VERIFIED = ".verified.json"
# A file changed more recently could change again within the resolution of its times, so it is not remembered.
SETTLED_S = 2.0
_CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 16


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True)
class FileFacts:
    """Length in bytes and blake2b of a file."""

    bytes: int
    digest: str


def add_file(digest: Digest, path: str | os.PathLike[str]) -> int:
    """Feeds the bytes of a file to a hash; returns how many. Raises OSError."""
    count, block = 0, bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(memoryview(block)[:size])
            count += size
    return count


def facts_of(path: str | os.PathLike[str]) -> FileFacts:
    """The facts of a file as it is now; raises OSError."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    return FileFacts(add_file(digest, path), digest.hexdigest())


def facts_of_bytes(data: bytes) -> FileFacts:
    """The facts of a file of these bytes."""
    return FileFacts(len(data), hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest())


def is_whole(path: Path, expected: FileFacts) -> bool:
    """Whether a file is as it was written; raises OSError when it cannot be read.

    For files that native code parses: one changed bit may end the process. A file found whole is remembered in
    VERIFIED beside it, if that can be written, and is read again once its size, times or inode have changed. Damage
    below the file system changes none of them; `facts_of` finds it.
    """
    found = path.stat()
    if found.st_size != expected.bytes:
        return False
    # A copy has another inode, and a change whose time was set back another st_ctime.
    entry = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, expected.digest]
    memory, known = path.with_name(VERIFIED), {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        entries = json.loads(memory.read_text(encoding="utf-8"))
        known = entries if isinstance(entries, dict) else {}
    if known.get(path.name) == entry:
        return True
    if facts_of(path) != expected:
        return False
    if time.time() - max(found.st_mtime_ns, found.st_ctime_ns) / 1e9 >= SETTLED_S:
        kept = {name: one for name, one in known.items() if os.path.exists(path.with_name(name))}
        with contextlib.suppress(OSError, DataError), atomic_write(memory) as stream:
            json.dump({**kept, path.name: entry}, stream)
    return True


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to anything; raises UnreadableError when the system cannot say.

    `Path.exists` calls a file absent whose folder may not be entered, or whose share is away: in Python 3.14 for every
    error of the system, before that for some.
    """
    return _stat(path) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a regular file; raises as `is_there`."""
    found = _stat(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a folder; raises as `is_there`."""
    found = _stat(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if is_absent(error):
            return None
        raise UnreadableError.of(path, error) from error
    except ValueError:  # a NUL in the name
        return None
