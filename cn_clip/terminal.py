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
from dataclasses import replace
from typing import Any, NoReturn, TextIO

from cn_clip import progress
from cn_clip.errors import CnClipError
from cn_clip.language import both, language, translated
from cn_clip.progress import cells_of
from cn_clip.secret import hidden_in

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
        language()
    except CnClipError as error:  # in which language it would be told is what is wrong
        _end(f"error: {error}", status=2)
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # at exit, a reader that is gone would be a traceback
    except CnClipError as error:
        fail(told(error), status=status)
    except KeyboardInterrupt:
        _end(both("已中断", "interrupted"), status=130)
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
        fail(translated(sentence), status=1)


def told(error: BaseException) -> str:
    """What an error says, in the reader's language; the parser of a command line repeats what was typed."""
    if not isinstance(error, CnClipError) or error.at is None:
        return hidden_in(translated(str(error)))
    at = error.at if error.at.part is None else replace(error.at, part=translated(error.at.part))
    return hidden_in(f"{at}: {translated(error.sentence)}")


def fail(sentence: str, *, status: int) -> NoReturn:
    """Ends the process with one line on standard error; `sentence` is in the reader's language."""
    _end(both("错误：", "error: ") + sentence, status=status)


def explained(error: Exception) -> str | None:
    """One sentence on an error of the system: a path that cannot be used, no memory. None for any other error."""
    if isinstance(error, MemoryError):
        details = f" ({error})" if str(error) else ""
        return f"not enough memory{details}; use smaller batches or fewer workers"
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
    progress.put_away()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def _end(line: str, *, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def counted(number: int, noun: str) -> str:
    """A number with its English noun: `1 caption`, `1,610 captions`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(value: object) -> str:
    """One line of printable text: what is no UTF-8 or moves the cursor comes out as an escape."""
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") else one
        for one in str(value)
    )


def pad(text: str, cells: int, *, right: bool = False) -> str:
    """`text` filled with spaces to `cells` terminal cells, aligned left, or right if `right`."""
    blanks = " " * (cells - cells_of(text))
    return blanks + text if right else text + blanks


def align(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """One line a row, columns aligned and two cells apart; those numbered in `right` are aligned right.

    Raises ValueError when the rows are not of one length.
    """
    padded = []
    for number, column in enumerate(zip(*rows, strict=True)):
        cells = max(map(cells_of, column))
        padded.append([pad(text, cells, right=number in right) for text in column])
    return ["  ".join(texts).rstrip() for texts in zip(*padded, strict=True)]


# Chinese text may be broken between any two characters, but not before these and not after those.
_NEVER_FIRST, _NEVER_LAST = "，。、；：？！）】》”’…,.;:?!)]}", "（【《“‘([{"


def wrap(text: str, cells: int, *, indent: int = 0) -> list[str]:
    """`text` in lines of at most `cells` terminal cells, broken at spaces and between Chinese characters.

    indent: blanks before all lines but the first. A longer word is cut, after a comma if it has one.
    """
    lines, line = [], ""
    for piece in _pieces(text):
        room = cells - cells_of(line)
        if cells_of(piece.rstrip()) > room and line.strip():
            lines.append(line.rstrip())
            line = " " * indent
            piece = piece.lstrip()
        while cells_of(piece.rstrip()) > cells - cells_of(line):
            end = _fitting(piece, max(cells - cells_of(line), 2))
            lines.append(line + piece[:end])
            line, piece = " " * indent, piece[end:]
        line += piece
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def _pieces(text: str) -> list[str]:
    """The shortest parts of a text that stay on one line, each with the blanks behind it."""
    pieces: list[str] = []
    for character in text:
        before = pieces[-1][-1] if pieces else ""
        is_break = before == " " != character or (
            (_is_wide(character) or _is_wide(before)) and before not in _NEVER_LAST
        )
        if pieces and (character == " " or character in _NEVER_FIRST or not (is_break and before)):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def _is_wide(character: str) -> bool:
    return bool(character) and unicodedata.east_asian_width(character) in "WF"


def _fitting(word: str, cells: int) -> int:
    """How many characters of a word that is too long come first: up to the last comma that fits, else all that fit."""
    end = 1
    while end < len(word) and cells_of(word[: end + 1]) <= cells:
        end += 1
    comma = word.rfind(",", 0, end)
    return comma + 1 if comma > 0 else end
