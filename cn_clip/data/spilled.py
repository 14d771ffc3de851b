"""Lists that are too long for memory: their records lie in a temporary file of this machine, which no name keeps."""

import json
import mmap
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cn_clip.errors import DataError, reason_of
from cn_clip.retrieval.ids import HashArray, coming_twice, hashes_of
from cn_clip.retrieval.segments import ItemId

# In memory is one offset for so many records.
_RECORDS_A_BLOCK = 64
_BUFFER = 1 << 20
_HASHES_AT_ONCE = 1 << 14


class Spilled:
    """Records that JSON holds, by number, in the order in which they were appended.

    The file lies where `tempfile` puts it, which `TMPDIR` decides; it goes with the process. Raises DataError when it
    cannot be written.
    """

    def __init__(self, records: Iterable[Any] = ()) -> None:
        self._file = tempfile.TemporaryFile("w+b", prefix="cn_clip-", buffering=_BUFFER)  # noqa: SIM115 - as long as this
        self._offsets, self._size, self._count = array("Q"), 0, 0
        self._reading = threading.Lock()
        weakref.finalize(self, self._file.close)
        for record in records:
            self.append(record)

    def append(self, record: Any) -> None:
        """Adds one at the end."""
        if self._count % _RECORDS_A_BLOCK == 0:
            self._offsets.append(self._size)
        line = json.dumps(record).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise DataError(
                f"the list of the inputs cannot be written ({reason_of(error)}); free some space, or set TMPDIR",
                at=tempfile.gettempdir(),
            ) from error
        self._size += len(line)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> list[Any]:
        """Those from one number to before another."""
        found, first = [], start - start % _RECORDS_A_BLOCK
        with self._reading:
            if start < min(stop, self._count):
                self._file.seek(self._offsets[first // _RECORDS_A_BLOCK])
                lines = [self._file.readline() for _ in range(first, min(stop, self._count))]
                self._file.seek(0, 2)
                found = lines[start - first :]
        return [json.loads(line) for line in found]

    def __iter__(self) -> Iterator[Any]:
        step = 64 * _RECORDS_A_BLOCK
        for start in range(0, self._count, step):
            yield from self.read(start, start + step)


def first_twice(ids: Iterable[ItemId], number: int) -> ItemId | None:
    """An id that comes more than once, if there is one; 8 bytes of each lie in a temporary file.

    ids: read twice if two of them may be one.
    """
    if not number:
        return None
    with tempfile.TemporaryFile("w+b", prefix="cn_clip-") as file:
        file.truncate(number * np.dtype(np.uint64).itemsize)
        hashes_N: HashArray = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint64)
        start = 0
        for block in _blocks(ids):
            hashes_N[start : start + len(block)] = hashes_of(block)
            start += len(block)
        hashes_N.sort()
        suspects = coming_twice(hashes_N)
    seen = set[ItemId]()
    for block in _blocks(ids) if suspects else ():
        for one, value in zip(block, hashes_of(block).tolist(), strict=True):
            if value in suspects:
                if one in seen:
                    return one
                seen.add(one)
    return None


def _blocks(ids: Iterable[ItemId]) -> Iterator[Sequence[ItemId]]:
    block: list[ItemId] = []
    for one in ids:
        block.append(one)
        if len(block) == _HASHES_AT_ONCE:
            yield block
            block = []
    if block:
        yield block
