"""The error tree: everything this package raises on purpose, so that callers can catch one type."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Where:
    """Where in the input an error is, as its sentence begins.

    path: a file, a folder or an address. line: of the file, from 1. part: of the file, in words. field: of the record.
    id: of the picture, text or item, if it is known. `str()` of some:
        Where("t.jsonl", line=7, field="image_ids")            t.jsonl:7 image_ids
        Where("lmdb/imgs", part="image id 15", id=15)          lmdb/imgs: image id 15
    """

    path: object
    line: int | None = None
    part: str | None = None
    field: str | None = None
    id: int | str | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        part = "" if self.part is None else f": {self.part}"
        field = "" if self.field is None else f" {self.field}"
        return f"{self.path}{line}{part}{field}"

    def of(self, field: str) -> "Where":
        """One field of the same record."""
        return replace(self, field=field)


class CnClipError(Exception):
    """Base of all errors that name their cause; commands print it on one line and exit with status 1.

    at: a `Where`, or what stands for its path; the message is then "AT: WHAT", and programs read `path`, `line` and
    `id`, each None if the error is of no file, line or record.
    """

    at: Where | None = None
    path: str | None = None
    line: int | None = None
    id: int | str | None = None

    def __init__(self, *what: object, at: object = None) -> None:
        if at is None:
            super().__init__(*what)
        else:
            super().__init__(f"{at}: {' '.join(map(str, what))}")
            where = at if isinstance(at, Where) else Where(at)
            self.at = replace(where, path=str(where.path))  # the error passes between processes
            self.path, self.line, self.id = str(where.path), where.line, where.id

    @property
    def sentence(self) -> str:
        """The message without the place before it."""
        return str(self) if self.at is None else str(self).removeprefix(f"{self.at}: ")


class ConfigError(CnClipError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(CnClipError, ValueError):
    """An input file or record is not what its format says; the message starts with file and line or id."""


class OutputError(DataError, OSError):
    """A file cannot be written; `strerror` says why."""


class UnreadableError(DataError, OSError):
    """A file that is there, or may be, cannot be read just now; `strerror` says why."""

    @classmethod
    def of(cls, path: str | os.PathLike[str], cause: OSError, advice: str = "is the disk there?") -> "UnreadableError":
        """Names the file, what the system said, and what to do."""
        error = cls(f"cannot be read just now ({reason_of(cause)}); {advice}", at=os.fspath(path))
        error.strerror = cause.strerror or str(cause)
        return error


def reason_of(error: OSError) -> str:
    """What the system said, in words and as a number."""
    return (error.strerror or str(error)) + ("" if error.errno is None else f", errno {error.errno}")


def is_absent(error: BaseException | None) -> bool:
    """Whether the system says that there is no such file. Whatever else it says may be over in a minute."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)


class CheckpointError(CnClipError, RuntimeError):
    """A weight file cannot be read, or does not fit the model."""


class NotFiniteError(CheckpointError):
    """A model gives rows that are no unit vectors; `positions`: of their inputs, counted from 0."""

    def __init__(self, what: str, positions: Sequence[int]) -> None:
        super().__init__(what, positions)  # by these it is made again in another process
        self.what, self.positions = what, list(positions)

    def __str__(self) -> str:
        return (
            f"{self.what}: the model gives NaN or infinity; compute in fp32, or with a file exported so, and if that "
            "does not help, check the weights"
        )


class DownloadError(CnClipError, RuntimeError):
    """A model file could not be fetched or failed its check."""


class StoreError(CnClipError, RuntimeError):
    """A server that keeps vectors does not answer in time, or refuses; the message starts with its address."""


class AwayError(StoreError):
    """A server that keeps vectors does not answer, or not in time; later it may."""


class MissingExtraError(CnClipError, ImportError):
    """An optional package is not installed; the message carries the pip command."""


@contextlib.contextmanager
def reading(
    path: object,
    error_type: type[CnClipError],
    *,
    what: str = "cannot be read",
    step: str,
    look: Callable[[Any], str | None] | None = None,
) -> Iterator[None]:
    """Turns whatever another package raises inside into one error: "PATH: WHAT (REASON); STEP".

    path: None for a file that only the caller can name; the message then begins with WHAT.
    look: says of `path` what it really is, and what to do; then that follows the path instead.
    On damaged bytes, parsers raise errors of any type, which differ from version to version; those written in Rust
    panic, which is no Exception. Errors of this package pass as they are. Only calls of the other package belong
    inside: a fault of our own would become a sentence about the file.
    """
    try:
        yield
    except CnClipError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        known = None if look is None else look(path)
        # contextlib takes a RuntimeError from a StopIteration for one of the generator, and lets the latter pass.
        cause = None if isinstance(error, StopIteration) else error
        raise error_type(known or f"{what} ({first_sentence(error, path)}); {step}", at=path) from cause


_LONGEST_REASON = 300


def first_sentence(error: BaseException, path: object = None) -> str:
    """The first sentence of what an error says, without `path` before it; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}"
    text = str(error).strip().removeprefix(f"{path}: ")
    return re.split(r"\.?\n|\. |\.$", text, maxsplit=1)[0][:_LONGEST_REASON] or type(error).__name__


_NO_MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "failed to allocate", "out of memory", "alloc_failed")


def lacked_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, on the machine or on its GPU, as far as the words of a library tell."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in words for sign in _NO_MEMORY)
