"""JSON Lines in and out: errors carry file and line, files appear whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cn_clip.errors import DataError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; on success flushes it to disk and renames it, on error removes it.

    Raises DataError when the folder does not exist. Text is UTF-8 with "\\n" line ends.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise DataError(f"{target}: the folder {target.parent} does not exist; create it first")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes without line end) of the non-blank lines of a file."""
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed by the `with` below; opened here to word the error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error
    with stream:
        for number, line in enumerate(stream, start=1):
            stripped = line.rstrip(b"\r\n")
            if stripped.strip():
                yield number, stripped


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
