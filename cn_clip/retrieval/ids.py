"""Which row has an id: the hashes of the ids of a segment, sorted, in a derived file; `store` and `writer` ask it."""

# N rows of a segment, T tops, Q queries, F found rows

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from json.encoder import encode_basestring_ascii
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.retrieval.engines import Rows
from cn_clip.retrieval.manifest import ADVICE, SegmentFacts
from cn_clip.retrieval.parts import Part
from cn_clip.retrieval.segments import BLOCK_BYTES, IntArray, ItemId, MappedFile, Mask, Segment, Table

NAME = "ids.bin"
# Segments of fewer rows have no such file: their lines are read.
SMALLEST = 1024

_HASH, _ROW = np.dtype("<u8"), np.dtype("<u4")
# Each of so many hashes stands at the beginning of the file, too: what lies between two of them is one block or two.
_STEP = BLOCK_BYTES // _HASH.itemsize
# More ids than these are looked up in the whole file, which is faster then than a block for each.
_FEW = 256

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,511}")

HashArray = NDArray[np.uint64]


def hash_of(item_id: ItemId) -> bytes:
    """8 bytes, of the JSON of an id: 1 and "1" are different ids."""
    text = encode_basestring_ascii(item_id) if isinstance(item_id, str) else str(item_id)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def hashes_of(ids: Iterable[ItemId]) -> HashArray:
    """The hashes of ids, in their order."""
    return np.frombuffer(b"".join(map(hash_of, ids)), dtype=_HASH).astype(np.uint64)


def coming_twice(hashes_N: HashArray) -> set[int]:
    """The hashes that come more than once; hashes_N: rising."""
    return set(hashes_N[1:][hashes_N[1:] == hashes_N[:-1]].tolist())


def integers(name: str) -> list[int]:
    """The integer that is written so, if there is one."""
    return [int(name)] if _INTEGER.fullmatch(name) else []


class IdTable:
    """The hashes of the ids of a segment, sorted, and the row of each."""

    def __init__(
        self, hashes_N: HashArray, rows_N: NDArray[np.unsignedinteger], check: Callable[[int, int], None] | None = None
    ) -> None:
        """check: is called with a range of bytes of the file before they are read."""
        self._tops_T, self.hashes_N, self.rows_N = hashes_N[::_STEP], hashes_N, rows_N
        self._check = check

    @classmethod
    def of_file(cls, file: MappedFile, num_rows: int) -> "IdTable":
        """Raises DataError for a file of another length."""
        num_tops = -(-num_rows // _STEP)
        if file.num_bytes != _HASH.itemsize * (num_tops + num_rows) + _ROW.itemsize * num_rows:
            raise DataError(f"is no list of {num_rows} ids; {ADVICE}", at=file.path)
        table = cls.__new__(cls)
        table._tops_T = np.frombuffer(file.data, _HASH, num_tops)
        table.hashes_N = np.frombuffer(file.data, _HASH, num_rows, _HASH.itemsize * num_tops)
        table.rows_N = np.frombuffer(file.data, _ROW, num_rows, _HASH.itemsize * (num_tops + num_rows))
        table._check = file.check
        table._check(0, _HASH.itemsize * num_tops)
        return table

    @classmethod
    def of_items(cls, segment: Segment) -> "IdTable":
        """By reading all items; raises DataError for a damaged one."""
        hashes_N = hashes_of(item_id for item_id, _ in segment.items(0, len(segment)))
        order_N = np.argsort(hashes_N, kind="stable")
        return cls(hashes_N[order_N], order_N.astype(_ROW))

    def find(self, hashes_Q: HashArray) -> tuple[IntArray, IntArray]:
        """(numbers of hashes, rows), F of each: every row that has one of the hashes; raises DataError for damage."""
        if len(hashes_Q) <= _FEW:
            spans = np.array([self._span(one) for one in hashes_Q], dtype=np.int64).reshape(-1, 2)
        else:
            self.check_all()
            order_Q = np.argsort(hashes_Q)
            spans = np.empty((len(hashes_Q), 2), dtype=np.int64)
            spans[order_Q, 0] = np.searchsorted(self.hashes_N, hashes_Q[order_Q], side="left")
            spans[order_Q, 1] = np.searchsorted(self.hashes_N, hashes_Q[order_Q], side="right")
        counts_Q = spans[:, 1] - spans[:, 0]
        numbers_F = np.repeat(np.arange(len(hashes_Q)), counts_Q)
        # Rows start, start + 1, ... of each span.
        within_F = np.arange(len(numbers_F)) - np.repeat(np.cumsum(counts_Q) - counts_Q, counts_Q)
        places_F = spans[numbers_F, 0] + within_F
        first = _HASH.itemsize * (len(self._tops_T) + len(self.hashes_N))
        if self._check is not None and len(places_F) <= _FEW:
            for place in places_F.tolist():
                self._check(first + _ROW.itemsize * place, first + _ROW.itemsize * (place + 1))
        elif self._check is not None:
            self.check_all()
        return numbers_F, self.rows_N[places_F].astype(np.int64)

    def check_all(self) -> None:
        """Raises DataError for damage."""
        if self._check is not None:
            size = _HASH.itemsize * (len(self._tops_T) + len(self.hashes_N)) + _ROW.itemsize * len(self.rows_N)
            self._check(0, size)

    def _span(self, one: np.uint64) -> tuple[int, int]:
        """From where to where the hashes are equal to one."""
        low = max(int(np.searchsorted(self._tops_T, one, side="left")) - 1, 0) * _STEP
        high = min(int(np.searchsorted(self._tops_T, one, side="right")) * _STEP, len(self.hashes_N))
        if self._check is not None:
            first = _HASH.itemsize * len(self._tops_T)
            self._check(first + _HASH.itemsize * low, first + _HASH.itemsize * high)
        part = self.hashes_N[low:high]
        return (
            low + int(np.searchsorted(part, one, side="left")),
            low + int(np.searchsorted(part, one, side="right")),
        )


def table_of(segment: Segment) -> IdTable:
    """By the derived file, else by reading the items, once; raises DataError for a damaged item."""
    return TABLE.of(segment)


def whole_table(segment: Segment) -> IdTable:
    """One of which every byte has been checked."""
    table = table_of(segment)
    try:
        table.check_all()
    except DataError as error:
        return TABLE.again(segment, error)
    return table


TABLE = Table(NAME, lambda segment, file: IdTable.of_file(file, len(segment)), IdTable.of_items)


def positions_of(rows: Rows, alive_N: Mask, ids: Sequence[ItemId]) -> dict[ItemId, int]:
    """The position of each of the ids that an item has; raises DataError for a damaged item."""
    found: dict[ItemId, int] = {}
    if not ids or not rows.segments:
        return found
    hashes_Q = hashes_of(ids)
    for segment, start in zip(rows.segments, rows.starts, strict=False):
        try:
            numbers, places = table_of(segment).find(hashes_Q)
        except DataError as error:
            numbers, places = TABLE.again(segment, error).find(hashes_Q)
        is_alive = alive_N[start + places]
        for number, row in zip(numbers[is_alive].tolist(), places[is_alive].tolist(), strict=True):
            item_id = segment.item(row)[0]
            if item_id == ids[number] and type(item_id) is type(ids[number]):  # others may have the same hash
                found[item_id] = start + row
    return found


def write(parts: Sequence[Part], stream: IO[Any], _segment: SegmentFacts) -> None:
    """The table of a segment that consists of parts of others. Memory: 40 bytes a row."""
    hashes, rows, start = [np.empty(0, dtype=_HASH)], [np.empty(0, dtype=_ROW)], 0
    for part in parts:
        table = whole_table(part.segment)
        new_N = start + np.cumsum(part.kept_N) - 1
        is_kept_N = part.kept_N[table.rows_N]
        hashes.append(table.hashes_N[is_kept_N])
        rows.append(new_N[table.rows_N[is_kept_N]].astype(_ROW))
        start += part.num_rows
    hashes_N, rows_N = np.concatenate(hashes), np.concatenate(rows)
    order_N = np.argsort(hashes_N, kind="stable")
    hashes_N = hashes_N[order_N].astype(_HASH)
    stream.write(hashes_N[::_STEP].tobytes())
    stream.write(hashes_N.data)
    stream.write(rows_N[order_N].data)
