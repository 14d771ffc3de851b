"""JSON Lines: reading them, with file and line in every error, and the form of JSON that the file formats hold."""

import codecs
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from cn_clip.errors import DataError, Where


def numbered_lines(path: str | os.PathLike[str], *, with_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes without line end) of the lines of a file, blank ones only with `with_blank`.

    A line ends with "\\n" or "\\r\\n" and with no other character; a byte-order mark does not belong to the first line.
    Raises DataError when the file cannot be opened.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed by the `with` below; opened here to word the error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot be opened ({getattr(error, 'strerror', None) or error})", at=path) from error
    with stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            stripped = line.rstrip(b"\r\n")
            if with_blank or stripped.strip():
                yield number, stripped


def text_of(line: bytes, where: Where) -> str:
    """The line as text, without blanks around it; raises DataError that starts with `where` when it is not UTF-8."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8", at=where) from error


def _lines(stream: IO[bytes], path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:  # a bad disk, a share that went away: the system does not name the file
        raise DataError(f"cannot be read ({error.strerror})", at=path) from error


def json_object(line: bytes) -> dict[str, Any]:
    """Parses one line as a JSON object; raises DataError without path and line, which the caller knows."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise DataError(f"not valid JSON ({error}); expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {type(value).__name__}")
    return value


def parse_object(line: bytes, where: Where) -> dict[str, Any]:
    """As `json_object`; raises DataError that starts with `where`."""
    try:
        return json_object(line)
    except DataError as error:
        raise DataError(error, at=where) from error


def read_objects(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for each non-blank line; raises DataError with file:line."""
    for number, line in numbered_lines(path):
        yield number, parse_object(line, Where(path, line=number))


def dumps(value: object) -> str:
    """JSON as the file formats of this package hold it: one line, `", "` and `": "` between items, ASCII."""
    return json.dumps(value)
