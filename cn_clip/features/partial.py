"""The rows an extraction has computed so far, kept in a file, so that a killed run goes on where it stopped.

`X.partial` lies beside the output X: a line of JSON that says what is extracted, then the rows as little-endian float32
in the order of computing. Rows are handed to the system batch by batch and not forced onto the disk: a killed process
loses the batch in flight, a machine that loses power whatever had not reached the disk, which shows as rows that are
not of length 1 and are computed again. The finished output alone is forced onto the disk before it gets its name.
"""

# M rows in the order of computing, D embedding

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import CnClipError, DataError
from cn_clip.features.rows import FloatArray
from cn_clip.files import Lock, lock_file, take

# What is extracted, from what, with what: values that JSON can hold. Rows of another job are not gone on with.
Job: TypeAlias = Mapping[str, object]
Tell: TypeAlias = Callable[[str], None]

SUFFIX = ".partial"
# The rows begin at a multiple of this, so that their memory map is aligned.
_ALIGNMENT = 64
_LARGEST_HEADER = 1 << 20
# Unit rows are that exact in float32; a row of zeros or of random bytes is not.
_LENGTH_TOLERANCE = 1e-3
_ROWS_A_LOOK = 8192


class PartialFeatures:
    """The computed rows of one extraction, which sets `is_written` when the output holds them.

    A context manager: leaving it closes the file. It removes the file when it is empty, and when it is written unless
    the run was interrupted, for then the whole command is to be run again.
    """

    def __init__(self, output: str | os.PathLike[str], job: Job, embed_dim: int, tell: Tell) -> None:
        """Opens the file of `output` and goes on with it, or starts it again, telling why.

        Raises DataError when the folder is missing or not writable, or a file of that name holds something else;
        ConfigError when another process is at it.
        """
        self.path = Path(f"{os.fspath(output)}{SUFFIX}")
        self.embed_dim = embed_dim
        job = json.loads(json.dumps(job))
        self._header = _header(job, embed_dim)
        self._stream, self._lock = _open_alone(self.path)
        self._keep = False
        self.is_written = False
        self.num_rows = 0
        try:
            self._begin(job, tell)
        except BaseException:  # the caller has nothing to leave: the file and the lock go now
            self._close()
            raise

    def _begin(self, job: Job, tell: Tell) -> None:
        self._stream.seek(0)
        content = self._stream.read(_LARGEST_HEADER)
        found = content.partition(b"\n")[0]
        if not _is_ours(content):
            raise DataError("is no file of computed rows; move it away, or choose another output path", at=self.path)
        if found and found + b"\n" != self._header:
            tell(f"{self.path}: {_difference(found, job, self.embed_dim)}")
        elif found:
            self.num_rows = self._count()
            if self.num_rows:
                tell(
                    f"{self.path}: 已有 {self.num_rows} 条，从第 {self.num_rows + 1} 条继续 / "
                    f"{self.num_rows} rows are there, continuing at row {self.num_rows + 1}"
                )
                return
        self._stream.truncate(0)
        self._write(0, self._header)

    def _count(self) -> int:
        """Whole rows of length 1 at the beginning of the file."""
        whole = (os.fstat(self._stream.fileno()).st_size - len(self._header)) // (4 * self.embed_dim)
        rows_MD = self._map(max(whole, 0))
        for start in range(0, len(rows_MD), _ROWS_A_LOOK):
            lengths = np.linalg.norm(rows_MD[start : start + _ROWS_A_LOOK].astype(np.float64), axis=1)
            wrong = ~(np.abs(lengths - 1) < _LENGTH_TOLERANCE)
            if wrong.any():
                return start + int(np.argmax(wrong))
        return len(rows_MD)

    def put(self, first: int, rows_BD: FloatArray) -> None:
        """Keeps rows `first` to `first + B`; what was there from `first` on is dropped.

        Raises DataError, and keeps what is there, when they cannot be written.
        """
        assert first <= self.num_rows, "rows are computed in order"
        place = len(self._header) + 4 * self.embed_dim * first
        self._write(place, np.ascontiguousarray(rows_BD, dtype="<f4").tobytes())
        self.num_rows = first + len(rows_BD)

    def rows(self) -> FloatArray:
        """All rows (M, D), read from the file as they are looked at."""
        return self._map(self.num_rows)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Removes the file on a DataError, which going on would meet again; keeps it whatever else ends the run."""
        try:
            yield
        except DataError:
            if not self._keep:
                self.remove()
            raise

    def remove(self) -> None:
        """Deletes the file, once; while it is locked, lest it be another process's by then."""
        self.num_rows = 0
        if self._stream.closed:
            return
        self._stream.close()
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def _close(self) -> None:
        """Closes the file, and removes it when nothing is in it."""
        with contextlib.suppress(OSError):
            if not os.fstat(self._stream.fileno()).st_size:
                self.path.unlink()
        self._stream.close()
        self._lock.release()

    def _map(self, count: int) -> FloatArray:
        if not count:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        rows: NDArray[Any] = np.memmap(
            self._stream, dtype="<f4", mode="r", offset=len(self._header), shape=(count, self.embed_dim)
        )
        return rows

    def _write(self, place: int, data: bytes) -> None:
        try:
            self._stream.truncate(place)
            written = 0
            while written < len(data):
                written += self._stream.write(data[written:])
        except OSError as error:
            self._keep = True
            raise DataError(
                f"cannot be written ({error.strerror}); what is there is kept: free some space and run "
                "the command again, it goes on from there",
                at=self.path,
            ) from error

    def __enter__(self) -> "PartialFeatures":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        has_ended = error is None or isinstance(error, CnClipError)
        if not self.num_rows or (self.is_written and has_ended):
            self.remove()
        else:
            self._close()


def _header(job: Job, embed_dim: int) -> bytes:
    line = json.dumps({"job": job, "embed_dim": embed_dim}, sort_keys=True).encode()
    return line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"


def _is_ours(content: bytes) -> bool:
    """Whether a file is of this module: empty, zeros after a power failure, or begun as every header begins."""
    beginning = b'{"embed_dim": '
    return not content.strip(b"\0") or content[: len(beginning)] == beginning[: len(content)]


def _difference(found: bytes, job: Job, embed_dim: int) -> str:
    again = "从头开始 / starting again"
    try:
        header = json.loads(found)
        old, names = header["job"], {*header["job"], *job}
        other = sorted(name for name in names if old.get(name) != job.get(name))
        if header["embed_dim"] != embed_dim:
            other.append("embed_dim")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"读不出是什么，{again}: it does not say what it is of"
    listed = ", ".join(other)
    return f"属于另一次提取（{listed} 不同），{again}: it is of another extraction, with other {listed}"


def _open_alone(path: Path) -> tuple[Any, Lock]:
    """The file, unbuffered, for reading and writing, and the lock of its output; raises as `PartialFeatures`."""
    output = path.with_name(path.name.removesuffix(SUFFIX))
    if not path.parent.is_dir():
        raise DataError(f"the folder {path.parent} does not exist; create it first", at=output)
    if output.is_dir():
        raise DataError("is a folder; expected the path of a file to write", at=output)
    try:
        lock = take(lock_file(output), f"{path}: another process is extracting into this file")
        try:
            return open(path, "a+b", buffering=0), lock  # closed by the caller
        except OSError:
            lock.release()
            raise
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror}); choose another output path", at=path) from error
