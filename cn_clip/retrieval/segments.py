"""Segments of an index: folders of consecutive rows that never change; `store` reads and `writer` writes them.

A segment is memory-mapped, and each block of its files is compared with its digest when it is first read. CRC-32 runs
at 2 GB/s, blake2b at 0.6 and SHA-256 at 1.4 (zlib 1.2.13, OpenSSL 3, one core of an EPYC with SHA instructions), and it
finds every change of up to 32 bits in a row. 64 KiB are few enough to be read for one row.
"""

# N rows, W rows that are written at once, K keys, B blocks, D dimensions

import functools
import io
import json
import logging
import math
import mmap
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cn_clip.digests import facts_of
from cn_clip.errors import DataError, UnreadableError, Where
from cn_clip.files import sync_folder
from cn_clip.retrieval.manifest import ADVICE, SegmentFacts, VectorType, check_size, read_whole, unreadable
from cn_clip.retrieval.scanning import FloatArray as FloatArray
from cn_clip.retrieval.scanning import IntArray as IntArray
from cn_clip.retrieval.scanning import Mask as Mask
from cn_clip.retrieval.scanning import largest_norm

logger = logging.getLogger(__name__)

ItemId: TypeAlias = int | str
Metadata: TypeAlias = Mapping[str, Any]
Digests: TypeAlias = NDArray[np.uint32]
TableT = TypeVar("TableT")

VECTORS, ITEMS, THUMBNAILS, ROWS = FILES = ("vectors.npy", "items.jsonl", "thumbnails.bin", "rows.npy")
# The digests of all blocks of these files, in this order. Segments written before there were digests have none.
BLOCKS = "blocks.crc32"
# After the name of a derived file: the digests of its blocks.
DIGESTS = ".crc32"
# Columns of rows.npy.
KEY, ITEM_END, THUMBNAIL_END = range(3)
_ROW_BYTES = 3 * np.dtype(np.int64).itemsize
# Length of the headers that numpy writes for tables like these.
_HEADER_BYTES = 128
# Rows that are copied at once, and lines that are parsed at once.
BLOCK_ROWS = 4096
BLOCK_BYTES = 1 << 16
DIGEST = np.dtype("<u4")
# So many rows are read at a time to find out what was not recorded.
_BLOCK = 32768


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows to write, W of them. lines: of JSON, each with its end; lengths in bytes."""

    keys_W: IntArray
    vectors_WD: NDArray[np.floating]
    lines: bytes
    line_lengths_W: IntArray
    thumbnails: bytes
    thumbnail_lengths_W: IntArray


_encoded = json.JSONEncoder(allow_nan=False).encode


def item_line(item_id: ItemId, metadata: Metadata) -> bytes:
    """How an item lies in a segment; raises DataError for an id or metadata that JSON cannot hold."""
    if type(item_id) not in (int, str):
        raise DataError(f"an id is an int or a str, got {item_id!r}")
    try:
        return _encoded({"id": item_id, "metadata": dict(metadata)}).encode()
    except (TypeError, ValueError) as error:
        # Python writes no number of more than 4300 digits, in a message neither.
        name = repr(item_id) if isinstance(item_id, str) else hex(item_id)[:20]
        raise DataError(f"id {name}: its metadata is nothing that JSON holds ({error})") from error


def write_segment(
    folder: Path, blocks: Iterable[RowBlock], num_rows: int, embed_dim: int, vector_type: VectorType
) -> float:
    """Writes `num_rows` rows into `folder`, which must not exist; returns `largest_norm` of the vectors as written.

    Raises OSError. Memory: a block.
    """
    folder.mkdir()
    largest, item_end, thumbnail_end = 0.0, 0, 0
    with (
        open(folder / VECTORS, "wb") as vectors,
        open(folder / ITEMS, "wb") as items,
        open(folder / THUMBNAILS, "wb") as thumbnails,
        open(folder / ROWS, "wb") as rows,
    ):
        # No memory map: of a full disk that says nothing but SIGBUS.
        _write_header(vectors, np.dtype(vector_type), (num_rows, embed_dim))
        _write_header(rows, np.dtype(np.int64), (num_rows, 3))
        for block in blocks:
            vectors_WD = np.ascontiguousarray(block.vectors_WD, dtype=vector_type)
            if not (norm := largest_norm(vectors_WD)) <= largest:
                largest = norm
            vectors.write(vectors_WD.data)
            items.write(block.lines)
            thumbnails.write(block.thumbnails)
            table_W3 = np.empty((len(block.keys_W), 3), dtype=np.int64)
            table_W3[:, KEY] = block.keys_W
            table_W3[:, ITEM_END] = item_end + np.cumsum(block.line_lengths_W)
            table_W3[:, THUMBNAIL_END] = thumbnail_end + np.cumsum(block.thumbnail_lengths_W)
            rows.write(table_W3.data)
            item_end, thumbnail_end = item_end + len(block.lines), thumbnail_end + len(block.thumbnails)
    digests_B = np.concatenate([digests_of(folder / name) for name in FILES])
    (folder / BLOCKS).write_bytes(digests_B.astype(DIGEST).tobytes())
    for path in folder.iterdir():
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
    return largest


def _write_header(stream: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, facts)


def facts_of_segment(folder: Path, num_rows: int, largest: float) -> SegmentFacts:
    """What the manifest says of a segment that has just been written. largest: what `write_segment` returned."""
    files = {name: facts_of(folder / name) for name in (*FILES, BLOCKS)}
    return SegmentFacts(folder.name, num_rows, files, largest if math.isfinite(largest) else None)


def digests_of(path: Path) -> Digests:
    """The CRC-32 of each block of a file, in order; raises OSError."""
    with open(path, "rb", buffering=0) as stream:
        blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
        return np.fromiter(map(zlib.crc32, blocks), dtype=DIGEST)


def num_blocks(num_bytes: int) -> int:
    """Blocks of a file of so many bytes; the last may be shorter."""
    return -(-num_bytes // BLOCK_BYTES)


class MappedFile:
    """A file, memory-mapped: it can be read on when it is removed. Several threads may read one at once."""

    def __init__(self, path: Path, digests_B: Digests | None) -> None:
        """digests_B: None if they were never written: then nothing is compared. Raises DataError naming the file."""
        self.path, self._digests_B = path, digests_B
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._descriptor)
            self.num_bytes = os.fstat(self._descriptor).st_size
            mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) if self.num_bytes else b""
        except OSError as error:
            raise unreadable(path, error) from error
        # Read it only where `check` was called before.
        self.data: bytes | mmap.mmap = mapped
        self._is_seen = bytearray(b"\0" if digests_B is not None else b"\1") * num_blocks(self.num_bytes)

    def piece(self, start: int, stop: int) -> bytes:
        """A copy of the bytes from `start` to before `stop`; raises as `check`."""
        self.check(start, stop)
        return bytes(self.data[start:stop])

    def let_go(self) -> None:
        """Has the system count the pages read so far no more as memory of this process; they can be read again."""
        if isinstance(self.data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)

    def check(self, start: int, stop: int) -> None:
        """Raises DataError naming the first damaged block of a range of bytes, UnreadableError."""
        last = num_blocks(stop)
        block = self._is_seen.find(0, start // BLOCK_BYTES, last)
        while block >= 0:
            self._check_block(block)
            block = self._is_seen.find(0, block + 1, last)

    def check_rows(self, starts_N: NDArray[np.int64], size: int) -> None:
        """As `check`, for rows of `size` bytes each."""
        seen_B = np.frombuffer(self._is_seen, dtype=np.bool_)
        first_N, last_N = starts_N // BLOCK_BYTES, (starts_N + (size - 1)) // BLOCK_BYTES
        if size <= BLOCK_BYTES and seen_B[first_N].all() and seen_B[last_N].all():
            return
        for offset in (*range(0, size, BLOCK_BYTES), size - 1):
            blocks_N = (starts_N + offset) // BLOCK_BYTES
            unseen_N = blocks_N[~seen_B[blocks_N]]
            for block in np.unique(unseen_N).tolist() if len(unseen_N) else ():
                self._check_block(block)

    def damaged_blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every damaged block."""
        for block in range(len(self._is_seen)):
            try:
                self.check(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
            except UnreadableError:
                raise
            except DataError:
                yield block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.num_bytes)

    def _check_block(self, block: int) -> None:
        assert self._digests_B is not None, "blocks without digests count as seen"
        start = block * BLOCK_BYTES
        size = min(BLOCK_BYTES, self.num_bytes - start)
        if zlib.crc32(self._read(start, size)) != self._digests_B[block]:
            raise DataError(f"block {block} (bytes {start} to {start + size}) is damaged; {ADVICE}", at=self.path)
        self._is_seen[block] = 1

    def _read(self, start: int, size: int) -> bytes:
        """Through the file and not its map: of a bad disk, a map says nothing but SIGBUS."""
        if not hasattr(os, "pread"):  # Windows
            return self.data[start : start + size]
        try:
            return os.pread(self._descriptor, size, start)
        except OSError as error:
            raise unreadable(self.path, error) from error


class Segment:
    """A segment, memory-mapped: it can be read on when the folder is removed.

    What is read of it is compared with its digest first: raises DataError naming file and block, UnreadableError.
    tables: those of it that `Table` keeps, by the names of their files.
    """

    def __init__(self, folder: Path, facts: SegmentFacts, embed_dim: int, vector_type: VectorType) -> None:
        """Raises DataError naming the file that is missing or not what the manifest says."""
        self.folder, self.embed_dim, self.vector_type, self.facts = folder, embed_dim, vector_type, facts
        self._largest_norm = facts.largest_norm
        for name in FILES:
            if name not in facts.files:
                raise DataError(f"is not in the manifest; {ADVICE}", at=folder / name)
            check_size(folder / name, facts.files[name])
        digests = block_digests(folder, facts)
        self._vectors, self._items, self._thumbnails, self._rows = (
            MappedFile(folder / name, digests.get(name)) for name in FILES
        )
        self._vectors_ND = _array(self._vectors, np.dtype(vector_type), (facts.num_rows, embed_dim))
        self._table_N3: IntArray = _array(self._rows, np.dtype(np.int64), (facts.num_rows, 3))
        # Now, for a writer may remove them.
        self._derived = {name: file for name in derived_names(facts) if (file := _derived(folder, facts, name))}
        self.tables: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.facts.num_rows

    def derived(self, name: str) -> MappedFile | None:
        """A file derived from this segment; None where it was not made, is missing or not as long as it was written.

        Damage in it raises DataError when it is read: do without it then, as without the file.
        """
        return self._derived.get(name)

    @property
    def lacking(self) -> set[str]:
        """The derived files that the manifest names and that cannot be used."""
        return derived_names(self.facts) - self._derived.keys()

    @functools.cached_property
    def keys_N(self) -> IntArray:  # noqa: N802
        """The keys of the rows, which rise; 8 bytes a row."""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        first = self.key(0)
        if self._is_dense:
            return np.arange(first, first + len(self), dtype=np.int64)
        self._rows.check(0, self._rows.num_bytes)
        return np.ascontiguousarray(self._table_N3[:, KEY])

    @property
    def _is_dense(self) -> bool:
        """Whether each key is one more than that before it: they rise, so the first and the last say so."""
        return self.key(len(self) - 1) - self.key(0) == len(self) - 1

    def key(self, row: int) -> int:
        """The key of a row."""
        return int(self.keys_of(np.array([row]))[0])

    def keys_of(self, rows_K: IntArray) -> IntArray:
        """The keys (K,) of rows."""
        return self._column(rows_K, KEY)

    def find_keys(self, keys_K: IntArray) -> tuple[IntArray, Mask]:
        """(rows, whether they have these keys), K of each; reads only what it compares."""
        if not len(self):
            return np.zeros(len(keys_K), dtype=np.int64), np.zeros(len(keys_K), dtype=np.bool_)
        last = len(self) - 1
        if self._is_dense:
            rows_K = keys_K - self.key(0)
            return np.clip(rows_K, 0, last), (rows_K >= 0) & (rows_K <= last)
        low_K, high_K = np.zeros(len(keys_K), dtype=np.int64), np.full(len(keys_K), last, dtype=np.int64)
        while (low_K < high_K).any():
            middle_K = (low_K + high_K) // 2
            is_less_K = self._column(middle_K, KEY) < keys_K
            low_K, high_K = (
                np.where(is_less_K, np.minimum(middle_K + 1, high_K), low_K),
                np.where(is_less_K, high_K, middle_K),
            )
        return low_K, self._column(low_K, KEY) == keys_K

    def _column(self, rows_K: IntArray, column: int) -> IntArray:
        self._rows.check_rows(self._rows_at + _ROW_BYTES * rows_K, _ROW_BYTES)
        values_K: IntArray = self._table_N3[rows_K, column]
        return values_K

    @property
    def _rows_at(self) -> int:
        return self._rows.num_bytes - self._table_N3.nbytes

    def _span(self, column: int, start: int, stop: int) -> tuple[int, int]:
        """Where what belongs to the rows from `start` to before `stop` begins and ends."""
        if start >= stop:
            return 0, 0
        self._rows.check(self._rows_at + _ROW_BYTES * max(start - 1, 0), self._rows_at + _ROW_BYTES * stop)
        return int(self._table_N3[start - 1, column]) if start else 0, int(self._table_N3[stop - 1, column])

    def ends(self, start: int, stop: int) -> IntArray:
        """Keys, and where items and thumbnails end (stop - start, 3); not to be written to."""
        self._rows.check(self._rows_at + _ROW_BYTES * start, self._rows_at + _ROW_BYTES * stop)
        return self._table_N3[start:stop]

    @property
    def largest_norm(self) -> float:
        """The length of the longest vector; in a segment from before it was recorded, the first call reads them all.

        Raises DataError naming the first row that is not finite.
        """
        if self._largest_norm is None:
            largest = 0.0
            for start in range(0, len(self), _BLOCK):
                block = self.vectors(start, min(start + _BLOCK, len(self)))
                largest = max(norm := largest_norm(block), largest)
                if not math.isfinite(norm):
                    row = start + int(np.argmin(np.isfinite(block).all(axis=1)))
                    raise DataError(f"row {row} holds NaN or infinity; {ADVICE}", at=self.folder / VECTORS)
            self._largest_norm = largest
        return self._largest_norm

    def vectors(self, start: int, stop: int) -> NDArray[np.floating]:
        """Vectors (stop - start, D) as they are kept; not to be written to."""
        width, first = self._vectors_ND.strides[0], self._vectors.num_bytes - self._vectors_ND.nbytes
        self._vectors.check(first + width * start, first + width * stop)
        return self._vectors_ND[start:stop]

    def gather(self, rows_N: IntArray) -> NDArray[np.floating]:
        """Vectors (N, D) of rows in any order, as they are kept; a copy."""
        width, first = self._vectors_ND.strides[0], self._vectors.num_bytes - self._vectors_ND.nbytes
        self._vectors.check_rows(first + width * rows_N, width)
        return self._vectors_ND[rows_N]

    def item(self, row: int) -> tuple[ItemId, dict[str, Any]]:
        """(id, metadata); raises DataError for a damaged line."""
        return self.parse(self.item_bytes(row), lambda: Where(self.folder / ITEMS, line=row + 1))

    def items(self, start: int, stop: int) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) of consecutive rows, several times as fast as one by one."""
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            found = _parsed(self._items.piece(*self._span(ITEM_END, first, last)), last - first)
            yield from found if found is not None else map(self.item, range(first, last))

    @staticmethod
    def parse(line: bytes, where: Callable[[], object]) -> tuple[ItemId, dict[str, Any]]:
        """(id, metadata) of a line of an items.jsonl; raises DataError that starts with what `where` returns."""
        try:
            values = json.loads(line)
            item_id, metadata = values["id"], values["metadata"]
            if type(item_id) not in (int, str) or not isinstance(metadata, dict):
                raise TypeError(f"id {item_id!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"is damaged ({error}); {ADVICE}", at=where()) from error
        return item_id, metadata

    def item_bytes(self, row: int) -> bytes:
        """The line of an item, without its end."""
        return self._items.piece(*self._span(ITEM_END, row, row + 1))[:-1]

    def lines(self, start: int, stop: int) -> bytes:
        """The lines of consecutive items."""
        return self._items.piece(*self._span(ITEM_END, start, stop))

    def thumbnail(self, row: int) -> bytes:
        """A JPEG file, or nothing."""
        return self._thumbnails.piece(*self._span(THUMBNAIL_END, row, row + 1))

    def thumbnails(self, start: int, stop: int) -> bytes:
        """Those of consecutive rows, one after the other."""
        return self._thumbnails.piece(*self._span(THUMBNAIL_END, start, stop))

    def has_thumbnail(self, row: int) -> bool:
        """Whether there is one, without reading it."""
        start, stop = self._span(THUMBNAIL_END, row, row + 1)
        return start < stop

    @property
    def has_thumbnails(self) -> bool:
        """Whether any row has a thumbnail."""
        return self._thumbnails.num_bytes > 0

    def blocks(self, kept_N: Mask) -> Iterator[RowBlock]:
        """The rows that are kept, to write into another segment; what was read of the file is not kept in memory."""
        for start in range(0, len(self), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(self))
            chosen = np.flatnonzero(kept_N[start:stop])
            if not len(chosen):
                continue
            ends_W3 = self.ends(start, stop)
            before = np.array(self._ends_before(start))
            lengths_W3 = np.diff(ends_W3, axis=0, prepend=before[None])
            vectors_WD = self.vectors(start, stop)
            lines, thumbnails = self.lines(start, stop), self.thumbnails(start, stop)
            if len(chosen) < stop - start:
                stops_W3 = ends_W3[chosen] - before
                starts_W3 = stops_W3 - lengths_W3[chosen]
                lines, thumbnails = (
                    b"".join(
                        data[low:high]
                        for low, high in zip(starts_W3[:, one].tolist(), stops_W3[:, one].tolist(), strict=True)
                    )
                    for data, one in ((lines, ITEM_END), (thumbnails, THUMBNAIL_END))
                )
                vectors_WD, ends_W3, lengths_W3 = vectors_WD[chosen], ends_W3[chosen], lengths_W3[chosen]
            yield RowBlock(
                ends_W3[:, KEY], vectors_WD, lines, lengths_W3[:, ITEM_END], thumbnails, lengths_W3[:, THUMBNAIL_END]
            )
            for file in (self._vectors, self._items, self._thumbnails, self._rows):
                file.let_go()

    def _ends_before(self, row: int) -> tuple[int, int, int]:
        """The key of the row before, and where what belongs to it ends."""
        return tuple(self.ends(row - 1, row)[0].tolist()) if row else (0, 0, 0)


def _parsed(lines: bytes, count: int) -> list[tuple[ItemId, dict[str, Any]]] | None:
    """(id, metadata) of lines that are as they were written; None of others."""
    try:
        values = json.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")
        found = [(one["id"], one["metadata"]) for one in values]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_right = len(found) == count and {type(one) for one, _ in found} <= {int, str}
    return found if is_right and {type(one) for _, one in found} <= {dict} else None


@dataclass(frozen=True)
class Table(Generic[TableT]):
    """A table of each segment, by its derived file or, where that cannot be read, made of its items once.

    name: of the file. read: raises DataError for one that is damaged or of another segment. make: reads all items.
    """

    name: str
    read: Callable[[Segment, MappedFile], TableT]
    make: Callable[[Segment], TableT]

    def of(self, segment: Segment) -> TableT:
        """That of a segment; raises DataError for a damaged item. Damage of the file may show when it is used."""
        if self.name not in segment.tables:
            file, found = segment.derived(self.name), None
            if file is not None:
                try:
                    found = self.read(segment, file)
                except DataError as error:
                    warn_without(error)
            segment.tables[self.name] = self.make(segment) if found is None else found
        table: TableT = segment.tables[self.name]
        return table

    def again(self, segment: Segment, error: DataError) -> TableT:
        """That of the items, from now on, in place of a file that showed this damage."""
        warn_without(error)
        table = segment.tables[self.name] = self.make(segment)
        return table


def derived_names(facts: SegmentFacts) -> set[str]:
    """The derived files of a segment, without those that hold their digests."""
    return {name for name in facts.files if name not in (*FILES, BLOCKS) and not name.endswith(DIGESTS)}


def _derived(folder: Path, facts: SegmentFacts, name: str) -> MappedFile | None:
    try:
        check_size(folder / name, facts.files[name])
        if name + DIGESTS not in facts.files:
            raise DataError(f"is not in the manifest; {ADVICE}", at=folder / (name + DIGESTS))
        digests_B = _digests(folder, facts, name + DIGESTS, num_blocks(facts.files[name].bytes))
        return MappedFile(folder / name, digests_B)
    except DataError as error:
        warn_without(error)
        return None


def warn_without(error: DataError) -> None:
    """Says that a derived file is done without."""
    logger.warning(
        "%s; doing without it, which is slower, until `cn-clip index build` or `cn-clip index check --repair` makes it "
        "again",
        str(error).removesuffix(f"; {ADVICE}"),
    )


def block_digests(folder: Path, facts: SegmentFacts) -> dict[str, Digests]:
    """The digests of the blocks of each file; none of a segment from before there were any. Raises DataError."""
    if BLOCKS not in facts.files:
        return {}
    ends = np.cumsum([num_blocks(facts.files[name].bytes) for name in FILES])
    digests_B = _digests(folder, facts, BLOCKS, int(ends[-1]))
    return dict(zip(FILES, np.split(digests_B, ends[:-1]), strict=True))


def _digests(folder: Path, facts: SegmentFacts, name: str, expected: int) -> Digests:
    digests_B = np.frombuffer(read_whole(folder / name, facts.files[name]), dtype=DIGEST)
    if len(digests_B) != expected:
        raise DataError(f"expected the digests of {expected} blocks, got {len(digests_B)}; {ADVICE}", at=folder / name)
    return digests_B


def _array(file: MappedFile, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """The array of an npy file, whose bytes are not compared yet but for those of its header."""
    stream = io.BytesIO(file.piece(0, _HEADER_BYTES))
    try:
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"format {version}")
        found_shape, is_fortran, found_dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # numpy reads it as Python, which raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"its header cannot be read ({reason}); {ADVICE}", at=file.path) from error
    num_bytes = stream.tell() + dtype.itemsize * shape[0] * shape[1]
    if (found_shape, is_fortran, found_dtype, file.num_bytes) != (shape, False, dtype, num_bytes):
        raise DataError(
            f"expected {dtype} rows of the shape {shape} in {num_bytes} bytes, got {found_dtype} "
            f"{found_shape} in {file.num_bytes}; {ADVICE}",
            at=file.path,
        )
    array: NDArray[Any] = np.ndarray(shape, dtype, buffer=file.data, offset=stream.tell())
    return array
