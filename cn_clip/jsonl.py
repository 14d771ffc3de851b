"""JSON Lines in and out: errors carry file and line, files appear whole or not at all."""

import codecs
import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from cn_clip.errors import CnClipError, ConfigError, DataError, OutputError
from cn_clip.processes import host_name, is_alive

# The temporary files of this process: what else bears its number is of a dead one that had it before.
_being_written: set[Path] = set()
_naming = threading.Lock()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; on success flushes it to disk and renames it, on error removes it.

    A link stays, and the file it names is replaced. What a killed run left of the same file is removed.
    Raises DataError as `replaceable`, and OutputError, which is one, when the file cannot be written.
    Text is UTF-8 with "\\n" line ends.
    """
    target = replaceable(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    temporary = None
    try:
        handle, temporary = _begin(target)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if isinstance(error, (ConnectionError, CnClipError)):  # not of this file: a pipe, or an output within
            raise
        raise _cannot_be_written(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            _being_written.discard(temporary)


def replaceable(path: str | os.PathLike[str]) -> Path:
    """The place `atomic_write` would write, links followed.

    Raises DataError when its folder does not exist, and when something that is no regular file is there.
    """
    if not os.fspath(path):
        raise DataError("expected the path of a file to write, got an empty path")
    target = Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise DataError(f"{path}: the folder {Path(path).parent} does not exist; create it first")
        if target.is_dir():
            raise DataError(f"{path}: is a folder; expected the path of a file to write")
        if target.exists() and not target.is_file():
            raise DataError(f"{path}: is no regular file; expected the path of a file to write")
    except OSError as error:  # a name that is too long
        raise _cannot_be_written(path, error) from error
    return target


def refuse_inputs(flag: str, output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raises ConfigError when `output`, given with `flag`, is one of `inputs`, by whatever name, or is empty."""
    if not os.fspath(output):
        raise ConfigError(f"{flag}: expected a path, got an empty one")
    for path in inputs:
        if path and _is_same(output, path):
            raise ConfigError(f"{flag} {output}: would overwrite {path}, which it reads; give another path")


def _is_same(first: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        if os.path.samefile(first, other):
            return True
    except OSError:  # one of them does not exist
        pass
    return os.path.realpath(first) == os.path.realpath(other)


def _cannot_be_written(path: str | os.PathLike[str], cause: OSError) -> OutputError:
    reason = cause.strerror or str(cause)
    error = OutputError(f"{os.fspath(path)}: cannot be written ({reason})")
    error.strerror = reason
    return error


def _begin(target: Path) -> tuple[int, Path]:
    """A new temporary file of this process, opened, once those of dead ones are gone."""
    with _naming:
        _clear_leftovers(target)
        prefix = f".{target.name}.{host_name()}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".tmp")
        _being_written.add(Path(name))
    return handle, Path(name)


def _clear_leftovers(target: Path) -> None:
    beginning = f".{target.name}.{host_name()}-"
    pattern = re.compile(re.escape(beginning) + r"(\d+)-\w+\.tmp")
    for entry in os.listdir(target.parent):
        found = pattern.fullmatch(entry) if entry.startswith(beginning) else None
        if found is None:
            continue
        path, pid = target.with_name(entry), int(found[1])
        if path not in _being_written if pid == os.getpid() else not is_alive(pid):
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def numbered_lines(path: str | os.PathLike[str], *, with_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes without line end) of the lines of a file, blank ones only with `with_blank`.

    A line ends with "\\n" or "\\r\\n" and with no other character; a byte-order mark does not belong to the first line.
    Raises DataError when the file cannot be opened.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed by the `with` below; opened here to word the error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    with stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            stripped = line.rstrip(b"\r\n")
            if with_blank or stripped.strip():
                yield number, stripped


def text_of(line: bytes, where: str) -> str:
    """The line as text, without blanks around it; raises DataError that starts with `where` when it is not UTF-8."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _lines(stream: IO[bytes], path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:  # a bad disk, a share that went away: the system does not name the file
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def json_object(line: bytes) -> dict[str, Any]:
    """Parses one line as a JSON object; raises DataError without the place, which the caller knows."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise DataError(f"not valid JSON ({error}); expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {type(value).__name__}")
    return value


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """As `json_object`; raises DataError that starts with `where`."""
    try:
        return json_object(line)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_objects(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for each non-blank line; raises DataError with file:line."""
    for number, line in numbered_lines(path):
        yield number, parse_object(line, f"{path}:{number}")


def dumps(value: object) -> str:
    """JSON as the file formats of this package hold it: one line, `", "` and `": "` between items, ASCII."""
    return json.dumps(value)
