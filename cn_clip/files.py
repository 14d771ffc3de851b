"""Writes files and folders so that each appears whole or not at all, and keeps two processes from writing one output.

What is written lies first in a hidden folder beside the output, `.NAME.xxxxxxxx.tmp`, which its process holds by a
lock.
The system ends a lock with the process that has it, so a folder whose lock is free belongs to a process that died: the
next writer of the same output removes it, whatever the host or container of that process was called.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from cn_clip.errors import CnClipError, ConfigError, DataError, OutputError

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

_TEMPORARY = re.compile(r".*[a-z0-9_]{8}\.tmp")
_UNFINISHED = ".cn_clip-unfinished"
# Longest name, in bytes, to which a dot, eight letters and a suffix can be added.
_LONGEST_NAME = 200
_POLL_S = 0.05
# What `flock` says on a file system without locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# What an exchange of names says if the system or the file system cannot do it; EXDEV: a folder of a container's image.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV}


# --- one file


@contextlib.contextmanager
def atomic_write(path: StrPath, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file; on success flushes it to disk and gives it the name `path`, on error removes it.

    A link stays, and the file it names is replaced. The permissions of a file that is replaced are kept, those of a new
    one obey the umask. Text is UTF-8 with "\\n" line ends.
    Raises DataError as `replaceable`, and OutputError, which is one, when the file cannot be written.
    """
    target = replaceable(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    with _writing(path, target), HeldFolder(target.parent, _prefix(target)) as held:
        temporary = held.path / target.name
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _keep_mode(temporary, target)
        os.replace(temporary, target)
        sync_folder(target.parent)


def replaceable(path: StrPath) -> Path:
    """The path that `atomic_write` would write, links followed.

    Raises DataError when its folder does not exist, and when something that is no regular file is there.
    """
    if not os.fspath(path):
        raise DataError("expected the path of a file to write, got an empty path")
    target = Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise DataError(f"the folder {Path(path).parent} does not exist; create it first", at=path)
        if target.is_dir():
            raise DataError("is a folder; expected the path of a file to write", at=path)
        if target.exists() and not target.is_file():
            raise DataError("is no regular file; expected the path of a file to write", at=path)
    except OSError as error:  # a name that is too long
        raise _cannot_be_written(path, error) from error
    return target


def refuse_inputs(flag: str, output: StrPath, inputs: Iterable[StrPath | None]) -> None:
    """Raises ConfigError when `output`, given with `flag`, is one of `inputs`, by whatever name, or is empty."""
    if not os.fspath(output):
        raise ConfigError(f"{flag}: expected a path, got an empty one")
    for path in inputs:
        if path and _is_same(output, path):
            raise ConfigError(f"{flag} {output}: would overwrite {path}, which it reads; give another path")


def _is_same(first: StrPath, other: StrPath) -> bool:
    try:
        if os.path.samefile(first, other):
            return True
    except OSError:  # one of them does not exist
        pass
    return os.path.realpath(first) == os.path.realpath(other)


# --- a folder


@contextlib.contextmanager
def staged_folder(target: StrPath) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on success it replaces `target`, on error it is removed.

    The two exchange their names in one step, so that `target` is the old folder or the new one at every moment; on file
    systems without such a step, as `written_together`. A link stays, and the folder it names is replaced.
    Raises DataError when the folders cannot be written, and for a target that is a file or the folder the command runs
    in; ConfigError when another process is writing the same folder.
    """
    resolved = Path(os.path.realpath(target))
    with _writing(target, resolved):
        if resolved.exists() and not resolved.is_dir():
            raise DataError("exists and is no folder; choose another name for the folder", at=target)
        if resolved in (Path.cwd(), Path(resolved.anchor)):  # a shell would go on in the folder that was taken away
            raise DataError("is the folder this command runs in, or the root; choose a folder inside it", at=target)
    with _held_alone(target, resolved) as held:
        folder = held.path / resolved.name
        folder.mkdir()
        yield folder
        _sync_tree(folder)
        if resolved.exists():
            _keep_mode(folder, resolved)
            if not _exchange(folder, resolved):
                _begin_step(held.path, resolved)
                _settle(_beside(resolved, _UNFINISHED))
        else:
            os.rename(folder, resolved)
        sync_folder(resolved.parent)


@contextlib.contextmanager
def _held_alone(target: StrPath, resolved: Path) -> Iterator["HeldFolder"]:
    """A held folder beside `resolved`, for the one process that writes it; what another left unfinished is done."""
    with _writing(target, resolved):
        resolved.parent.mkdir(parents=True, exist_ok=True)
        with alone(lock_file(resolved), f"{target}: another process is writing it"):
            _settle(_beside(resolved, _UNFINISHED))
            with HeldFolder(resolved.parent, _prefix(resolved)) as held:
                yield held


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step; returns False where that cannot be done. Raises OSError."""
    library = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
    path, here = ctypes.c_char_p, -100  # AT_FDCWD
    if (renameat2 := getattr(library, "renameat2", None)) is not None:  # Linux, with RENAME_EXCHANGE
        renameat2.argtypes = (ctypes.c_int, path, ctypes.c_int, path, ctypes.c_uint)
        status = renameat2(here, os.fsencode(first), here, os.fsencode(second), 2)
    elif (renamex_np := getattr(library, "renamex_np", None)) is not None:  # macOS, with RENAME_SWAP
        renamex_np.argtypes = (path, path, ctypes.c_uint)
        status = renamex_np(os.fsencode(first), os.fsencode(second), 2)
    else:
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


# --- several files


@contextlib.contextmanager
def written_together(target: Path, *, told: StrPath | None = None) -> Iterator[Path]:
    """Yields an empty folder; on success all that is in it gets beside `target`, in one step.

    target: names the output as a whole, such as the prefix of its files; nothing need be there. told: how errors name
    it; default `target`.
    The step is the renaming of the filled folder to `.NAME.cn_clip-unfinished`. What is in that folder counts, instead
    of what bears its name beside it: a process killed before all files are moved leaves the rest there, and `settle`
    moves it. A reader of several files of such an output calls `settle` first.
    Raises DataError when the files cannot be written, ConfigError when another process is writing the same output.
    """
    resolved = Path(os.path.abspath(target))
    with _held_alone(told or target, resolved) as held:
        yield held.path
        for path in held.path.iterdir():
            target = resolved.parent / path.name
            if target.exists() and target.is_dir() != path.is_dir():
                raise DataError(f"is {'a folder' if target.is_dir() else 'a file'}; choose another name", at=target)
        _sync_tree(held.path)
        _begin_step(held.path, resolved)
        _settle(_beside(resolved, _UNFINISHED))


def settle(folder: StrPath) -> None:
    """Moves what killed processes left unfinished in `folder` where they belong; see `written_together`.

    Raises DataError when it cannot be moved: without it, the files of the folder do not belong together.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(_UNFINISHED)]
    except OSError:  # the reader will say what is wrong with the folder
        return
    for step in (Path(folder, name) for name in names):
        lock = Lock(step.with_suffix(".lock"))
        try:
            while step.is_dir():
                if lock.acquire():
                    try:
                        _settle(step)
                    finally:
                        lock.release()
                else:  # its writer is moving them
                    time.sleep(_POLL_S)
        except OSError as error:
            raise DataError(
                f"{step}: holds files of a run that was killed before it had moved them where they belong, and they "
                f"cannot be moved now ({error.strerror or error}); make the folder writable, or write it again"
            ) from error


def _begin_step(filled: Path, resolved: Path) -> None:
    os.rename(filled, _beside(resolved, _UNFINISHED))
    sync_folder(resolved.parent)


def _settle(step: Path) -> None:
    """Moves what is in `step` beside it; for the process that has the lock of its output."""
    if not step.is_dir():
        return
    for path in sorted(step.iterdir()):
        target = step.parent / path.name
        _keep_mode(path, target)
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    sync_folder(step.parent)
    step.rmdir()


# --- locks


class Lock:
    """A file that one process at a time has locked, and that says which; the system ends the lock with the process.

    The file is removed when the lock is given back. Children that `os.fork` makes do not share the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._pid = 0

    def acquire(self) -> bool:
        """Takes the lock unless another one has it; returns whether it is held now. Raises OSError.

        On a file system without locks it is never refused.
        """
        while True:
            handle = self._open()
            try:
                if _try_lock(handle) is False:
                    return False
                with contextlib.suppress(FileNotFoundError):  # the one before has given it back, and removed it
                    if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                        self._begin(handle)
                        handle = -1
                        return True
            finally:
                if handle >= 0:
                    os.close(handle)

    def is_abandoned(self) -> bool:
        """Whether the file is there and no process has it locked; False on a file system without locks."""
        handle = os.open(self.path, os.O_RDWR | _FLAGS)
        try:
            return _try_lock(handle) is True
        finally:
            os.close(handle)

    def release(self) -> None:
        """Gives the lock back; does nothing in a child of the process that took it, or when it is not held."""
        handle, self._handle = self._handle, None
        if handle is None or self._pid != os.getpid():
            return
        _handles.discard(handle)
        if sys.platform == "win32":  # an open file cannot be deleted there
            os.close(handle)
        with contextlib.suppress(OSError):
            self.path.unlink()
        if sys.platform != "win32":
            os.close(handle)

    def holder(self) -> str:
        """Which process has it, as far as the file says: `pid 123 on host, since 2026-01-31 12:00:00`."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(self.path.read_text(encoding="utf-8"))
            return f"pid {facts['pid']} on {facts['host']}, since {facts['since']}"
        return "which does not say its number"

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        except PermissionError:
            if not self.path.exists():
                raise
            return os.open(self.path, os.O_RDONLY | _FLAGS)  # another user's, in a folder that both use

    def _begin(self, handle: int) -> None:
        self._handle, self._pid = handle, os.getpid()
        _handles.add(handle)
        facts = {"pid": self._pid, "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk, or another user's file: the lock counts, not its words
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(facts).encode())


@contextlib.contextmanager
def alone(
    path: Path, busy: str, *, waiting: Callable[[str], object] | None = None, patience_s: float = 0
) -> Iterator[None]:
    """Holds the lock file `path` while the block runs.

    busy: what to say when another process has it. With `waiting`, that function is called once with the sentence, after
    `patience_s` seconds, and the lock waited for; without it, raises ConfigError. Raises OSError when the file cannot
    be made.
    """
    lock = take(path, busy, waiting=waiting, patience_s=patience_s)
    try:
        yield
    finally:
        lock.release()


def take(path: Path, busy: str, *, waiting: Callable[[str], object] | None = None, patience_s: float = 0) -> Lock:
    """As `alone`, for a lock that its owner releases."""
    lock, since = Lock(path), time.monotonic()
    while not lock.acquire():
        sentence = f"{busy} ({lock.holder()})"
        if waiting is None:
            raise ConfigError(f"{sentence}; wait until it has ended, or choose another name")
        if time.monotonic() - since >= patience_s:
            waiting(sentence)
            patience_s = float("inf")
        time.sleep(_POLL_S)
    return lock


def lock_file(target: Path) -> Path:
    """Where the lock of an output of that name lies: `.NAME.lock` beside it."""
    return _beside(target, ".lock")


_handles: set[int] = set()
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool | None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the words, which others may read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool | None:
        """Whether the file is locked now for this process; None if its file system has no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        return True


def _close_handles() -> None:
    """A lock lasts as long as any process has its file open: the workers of a killed run must not keep it."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_handles)


# --- temporary folders that die with their process


class HeldFolder:
    """A new folder that this process holds until it removes it or dies; those of dead processes are removed first.

    A context manager: leaving it removes the folder. path: an empty folder that only this user can enter.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        clear_leftovers(parent, prefix)
        while True:
            self._outer = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
            self._lock = Lock(_lock_of(self._outer))  # outside of what is filled, swept or renamed
            self.path = self._outer / "content"
            try:
                if self._lock.acquire():
                    self.path.mkdir(mode=0o700)
                    break
            except FileNotFoundError:  # taken for abandoned, before it was locked, and removed by another process
                continue
            except BaseException:
                self._lock.release()
                shutil.rmtree(self._outer, ignore_errors=True)
                raise
        self._pid = os.getpid()

    def remove(self) -> None:
        """Deletes it with all that is in it; does nothing in a child of the process that made it."""
        if self._pid == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.release()
            shutil.rmtree(self._outer, ignore_errors=True)

    def __enter__(self) -> "HeldFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def clear_leftovers(folder: Path, prefix: str) -> None:
    """Removes the temporary folders of this user in `folder` that begin with `prefix` and whose processes have ended.

    Raises OSError when `folder` cannot be listed.
    """
    for name in os.listdir(folder):
        if not (name.startswith(prefix) and is_temporary(name)):
            continue
        path = folder / name
        with contextlib.suppress(OSError):  # removed meanwhile, or being made just now
            if _is_own(path, stat.S_ISDIR) and _is_own(_lock_of(path), stat.S_ISREG):
                lock = Lock(_lock_of(path))
                if lock.is_abandoned() and lock.acquire():
                    shutil.rmtree(path / "content", ignore_errors=True)
                    lock.release()
                    path.rmdir()  # unless its process, which had not locked it yet, has done so now
                    logger.info("%s: removed, a process that was killed had left it", path)


def is_temporary(name: str) -> bool:
    """Whether a name is one that `HeldFolder` gives."""
    return bool(_TEMPORARY.fullmatch(name))


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    facts = os.lstat(path)
    return is_kind(facts.st_mode) and facts.st_uid == getattr(os, "getuid", lambda: facts.st_uid)()


def _lock_of(outer: Path) -> Path:
    return outer / "lock"


# --- names, errors, disks


def _prefix(target: Path) -> str:
    return f".{_short(target.name)}."


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{_short(target.name)}{suffix}")


def _short(name: str) -> str:
    """The name, or another one for it that leaves room for more letters."""
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return f"{name[:30]}{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"


@contextlib.contextmanager
def _writing(path: StrPath, resolved: Path) -> Iterator[None]:
    """Turns an error of the system into one of the output `path`, at `resolved`, unless it names a file elsewhere."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (ConnectionError, CnClipError)):
            raise
        if isinstance(error.filename, (str, bytes)):
            found = Path(os.path.abspath(os.fsdecode(error.filename)))
            is_temporary = os.fspath(found).startswith(os.fspath(resolved.parent / f".{_short(resolved.name)}"))
            if not (is_temporary or found == resolved or found in resolved.parents):
                raise
        raise _cannot_be_written(path, error) from error


def _cannot_be_written(path: StrPath, cause: OSError) -> OutputError:
    reason = cause.strerror or str(cause)
    error = OutputError(f"cannot be written ({reason})", at=os.fspath(path))
    error.strerror = reason
    return error


def _keep_mode(path: Path, target: Path) -> None:
    """Gives a file or folder the permissions of the one it is about to replace, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(path, stat.S_IMODE(os.stat(target).st_mode))


def _sync_tree(folder: Path) -> None:
    """Forces the files below a folder, and their names, onto the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last over a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # nor do some network disks sync them
        pass
    finally:
        os.close(handle)
