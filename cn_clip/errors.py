"""The error tree: everything this package raises on purpose, so that callers can catch one type."""

import errno
import os
from collections.abc import Sequence


class CnClipError(Exception):
    """Base of all errors that name their cause; commands print it on one line and exit with status 1."""


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
        error = cls(f"{os.fspath(path)}: cannot be read just now ({reason_of(cause)}); {advice}")
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


class MissingExtraError(CnClipError, ImportError):
    """An optional package is not installed; the message carries the pip command."""


_NO_MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "failed to allocate", "out of memory")


def lacked_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, on the machine or on its GPU, as far as the words of a library tell."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in words for sign in _NO_MEMORY)
