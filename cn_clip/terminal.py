"""What every command does with its terminal or pipe: any encoding is written, every end is one line and a status.

Also names in one printable line, and text tables, where a Chinese character is two cells wide.
"""

import contextlib
import errno
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from cn_clip.errors import CnClipError

# By the name of the error number, what to do about a path.
NEXT_STEPS = {
    "EACCES": "check who may read and write it, or choose another",
    "EPERM": "check who may read and write it, or choose another",
    "EROFS": "choose a path on another disk",
    "ENOSPC": "free some space, or choose another disk",
    "EDQUOT": "free some space, or choose another disk",
    "ENOTDIR": "a part of the path is a file; choose another",
    "EISDIR": "give the path of a file",
    "EEXIST": "choose another path, or remove it",
    "ENOENT": "check the path",
    "ENAMETOOLONG": "choose a shorter name",
    "EMFILE": "raise the limit of open files (ulimit -n), or use fewer workers",
}


def tolerate() -> None:
    """Lets this process's standard output and error write escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str, *, to: TextIO | None = None) -> None:
    """Prints a line at once, for functions that other programs call: their standard output may lack its characters."""
    stream = sys.stdout if to is None else to
    try:
        print(line, file=stream, flush=True)
    except UnicodeEncodeError:
        print(line.encode(stream.encoding, "backslashreplace").decode(stream.encoding), file=stream, flush=True)


def print_json(value: Any) -> None:
    """Prints one line of JSON; characters that standard output lacks become JSON's own escapes."""
    # A file name that is not UTF-8 holds lone surrogates, which no encoding has.
    line = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    print(line)


@contextlib.contextmanager
def ending(*, status: int = 1) -> Iterator[None]:
    """Around the work of a command: whatever ends it is one line on standard error and an exit status.

    `status` for a CnClipError, 1 for a path that cannot be used or a lack of memory, 130 for Ctrl-C, 141 when the
    reader of the output is gone. Other exceptions are faults of this package and keep their traceback.
    """
    tolerate()
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # at exit, a reader that is gone would be a traceback
    except CnClipError as error:
        _fail(f"错误 / error: {error}", status=status)
    except KeyboardInterrupt:
        _fail("已中断 / interrupted", status=130)
    except Exception as error:
        is_closed_pipe = isinstance(error, BrokenPipeError)
        if sys.platform == "win32" and isinstance(error, OSError):  # it calls that an invalid argument, of no file
            is_closed_pipe |= (error.errno, error.filename) == (22, None)
        if is_closed_pipe:
            with contextlib.suppress(OSError, ValueError):  # what is still to be written goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        sentence = explained(error)
        if sentence is None:
            raise
        _fail(f"错误 / error: {sentence}", status=1)


def explained(error: Exception) -> str | None:
    """One sentence on an error of the system: a path that cannot be used, no memory. None for any other error."""
    if isinstance(error, MemoryError):
        return (
            f"内存不足 / not enough memory{f' ({error})' if str(error) else ''}; use smaller batches or fewer workers"
        )
    if isinstance(error, OSError):
        paths = [os.fsdecode(one) for one in (error.filename, error.filename2) if isinstance(one, (str, bytes))]
        reason = error.strerror or str(error) or type(error).__name__
        step = NEXT_STEPS.get(errno.errorcode.get(error.errno or 0, ""))
        return ": ".join([*paths, reason]) + (f"; {step}" if step else "")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
        return f"{error}; give the path of a file or folder"
    if isinstance(error, ValueError) and "embedded null" in str(error):  # "byte", or "character" by Python 3.13
        return "a path holds a NUL character, which no file system allows; check the names in the input"
    return None


def leave(status: int) -> NoReturn:
    """Ends the process at once, whatever its threads do or wait for; what was printed and logged is written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def _fail(line: str, *, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def shown(value: object) -> str:
    """One line of printable text: what is no UTF-8 or moves the cursor comes out as an escape."""
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") else one
        for one in str(value)
    )


def width(text: str) -> int:
    """Terminal cells that `text` takes: 2 for wide and full-width characters, 0 for combining ones, else 1."""
    shown = (character for character in text if not unicodedata.combining(character))
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in shown)


def pad(text: str, cells: int, *, right: bool = False) -> str:
    """`text` filled with spaces to `cells` terminal cells, aligned left, or right if `right`."""
    blanks = " " * (cells - width(text))
    return blanks + text if right else text + blanks


def align(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """One line a row, columns aligned and two cells apart; those numbered in `right` are aligned right.

    Raises ValueError when the rows are not of one length.
    """
    padded = []
    for number, column in enumerate(zip(*rows, strict=True)):
        cells = max(map(width, column))
        padded.append([pad(text, cells, right=number in right) for text in column])
    return ["  ".join(texts).rstrip() for texts in zip(*padded, strict=True)]
