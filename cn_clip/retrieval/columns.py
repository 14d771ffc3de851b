"""Ids and metadata of a segment by column, in a derived file: each different value once, and which of them a row has.

`query` judges values, and asks for no row of its own. A file is a sequence of stripes, each of up to 65,536 rows with
values of its own, so that it is written and merged in bounded memory; its end says where what lies.

The rows {"a": "x"}, {"a": "y", "b": 1}, {"a": "x"} are a stripe of "a": values ["x", "y"], codes 1, 2, 1, and of "b":
values [1], codes 0, 1, 0. The code 0 is that of rows which lack the field.
"""

# S rows of a stripe, V values

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.retrieval.manifest import ADVICE, SegmentFacts
from cn_clip.retrieval.parts import Part
from cn_clip.retrieval.segments import ItemId, MappedFile, Mask, Segment, Table, warn_without

NAME = "columns.bin"
# Segments of fewer rows have no such file: their lines are read.
SMALLEST = 1024
STRIPE_ROWS = 65536
# Of a stripe, rows times fields: items that share no fields make shorter stripes.
STRIPE_CODES = 1 << 26
# The field that goes by the id instead, see `conditions.fields_of`.
_PATH = "path"
_LENGTH = np.dtype("<u8")
_CODES = tuple(map(np.dtype, ("u1", "<u2", "<u4")))

Codes = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Stripe:
    """Consecutive rows. ids: where those lie; columns: where values and codes of a field lie, and their type."""

    start: int
    num_rows: int
    ids: tuple[int, int]
    columns: Mapping[str, tuple[int, int, int, int, str]]


class Columns:
    """Those of a segment, in a file or in memory; raises DataError for damage when it is read."""

    def __init__(self, source: MappedFile | bytes) -> None:
        """Raises DataError for what is no such file."""
        self._source = source
        size = len(source) if isinstance(source, bytes) else source.num_bytes
        try:
            (length,) = np.frombuffer(self._bytes(size - _LENGTH.itemsize, size), dtype=_LENGTH).tolist()
            index = json.loads(self._bytes(size - _LENGTH.itemsize - length, size - _LENGTH.itemsize))
            self.stripes, start = [], 0
            for num_rows, ids, columns in index:
                self.stripes.append(Stripe(start, num_rows, ids, columns))
                start += num_rows
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"is no table of columns ({error}); {ADVICE}", at=getattr(source, "path", None)) from error

    @classmethod
    def of_items(cls, items: Iterable[tuple[ItemId, Mapping[str, Any]]]) -> "Columns":
        """In memory."""
        stream = io.BytesIO()
        with _Writer(stream) as writer:
            for item_id, metadata in items:
                writer.add(item_id, metadata)
        return cls(stream.getvalue())

    def _bytes(self, start: int, stop: int) -> bytes:
        return self._source[start:stop] if isinstance(self._source, bytes) else self._source.piece(start, stop)

    def ids(self, stripe: Stripe) -> list[ItemId]:
        """The ids (S,)."""
        found: list[ItemId] = json.loads(self._bytes(*stripe.ids))
        return found

    def values(self, stripe: Stripe, name: str) -> list[Any]:
        """The different values (V,) of a field; some may be of no row any more."""
        start, stop, *_ = stripe.columns[name]
        found: list[Any] = json.loads(self._bytes(start, stop))
        return found

    def codes(self, stripe: Stripe, name: str) -> Codes:
        """Which value each row (S,) has, counted from 1; 0: it lacks the field."""
        _, _, start, stop, dtype = stripe.columns[name]
        return np.frombuffer(self._bytes(start, stop), dtype=dtype)

    def copied(self, stripe: Stripe, kept_S: Mask, writer: "_Writer") -> None:
        """Writes the rows of a stripe that are kept as a stripe of another file; values stay as they are."""
        is_whole = bool(kept_S.all())
        ids = self._bytes(*stripe.ids)
        if not is_whole:
            ids = _dumped([one for one, is_kept in zip(self.ids(stripe), kept_S.tolist(), strict=True) if is_kept])
        columns = {}
        for name, (start, stop, *_) in stripe.columns.items():
            codes_S = self.codes(stripe, name)[kept_S]
            if is_whole or codes_S.any():
                columns[name] = self._bytes(start, stop), codes_S
        writer.put(int(np.count_nonzero(kept_S)), ids, columns)


@dataclass
class _Column:
    """The values of a field in a stripe that is being made."""

    values: list[Any] = field(default_factory=list)
    codes: dict[object, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    code_of_row: list[int] = field(default_factory=list)


class _Writer:
    """Writes stripes, and in the end where they lie."""

    def __init__(self, stream: IO[Any]) -> None:
        self._stream, self._at = stream, 0
        self._index: list[tuple[int, tuple[int, int], dict[str, Any]]] = []
        self._ids: list[ItemId] = []
        self._columns: dict[str, _Column] = {}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.flush()
            index = _dumped(self._index)
            self._stream.write(index + np.array([len(index)], dtype=_LENGTH).tobytes())

    def add(self, item_id: ItemId, metadata: Mapping[str, Any]) -> None:
        """The next row."""
        row = len(self._ids)
        self._ids.append(item_id)
        for name, value in metadata.items():
            if name == _PATH:
                continue
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = _Column()
            kind = type(value)
            # 1, 1.0 and true are different values to a condition; lists and objects have no hash, 0.0 equals -0.0.
            key = value if kind is str else (kind, value) if kind is int else (kind, repr(value))
            code = column.codes.get(key)
            if code is None:
                column.values.append(value)
                code = column.codes[key] = len(column.values)
            column.rows.append(row)
            column.code_of_row.append(code)
        if len(self._ids) >= STRIPE_ROWS or len(self._ids) * len(self._columns) > STRIPE_CODES:
            self.flush()

    def flush(self) -> None:
        """Ends a stripe."""
        if not self._ids:
            return
        columns = {}
        for name, column in self._columns.items():
            codes_S = np.zeros(
                len(self._ids), dtype=next(one for one in _CODES if len(column.values) <= np.iinfo(one).max)
            )
            codes_S[column.rows] = column.code_of_row
            columns[name] = _dumped(column.values), codes_S
        self.put(len(self._ids), _dumped(self._ids), columns)
        self._ids, self._columns = [], {}

    def put(self, num_rows: int, ids: bytes, columns: Mapping[str, tuple[bytes, Codes]]) -> None:
        """A stripe as it is."""
        spans = {}
        ids_at = self._write(ids)
        for name, (values, codes_S) in columns.items():
            spans[name] = (*self._write(values), *self._write(codes_S.tobytes()), codes_S.dtype.str)
        self._index.append((num_rows, ids_at, spans))

    def _write(self, data: bytes) -> tuple[int, int]:
        self._stream.write(data)
        start, self._at = self._at, self._at + len(data)
        return start, self._at


def _dumped(values: Sequence[Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def columns_of(segment: Segment) -> Columns:
    """By the derived file, else by reading the items, once; raises DataError for a damaged item."""
    return TABLE.of(segment)


def _of_file(segment: Segment, file: MappedFile) -> Columns:
    columns = Columns(file)
    if sum(one.num_rows for one in columns.stripes) != len(segment):
        raise DataError(f"is no table of {len(segment)} rows; {ADVICE}", at=file.path)
    return columns


TABLE = Table(NAME, _of_file, lambda segment: Columns.of_items(segment.items(0, len(segment))))


def write(parts: Sequence[Part], stream: IO[Any], _segment: SegmentFacts) -> None:
    """The columns of a segment that consists of parts of others. Memory: a stripe.

    Large stripes are copied, so that a merge of large segments judges no row; the rows of small ones become large ones.
    """
    with _Writer(stream) as writer:
        for part in parts:
            source = part.segment.derived(NAME)
            for start, stop, copy in _pieces(part, source):
                kept_S = part.kept_N[start:stop]
                if copy is not None:
                    writer.flush()
                    copy(kept_S, writer)
                else:
                    for row_kept, item in zip(kept_S.tolist(), part.segment.items(start, stop), strict=True):
                        if row_kept:
                            writer.add(*item)


def _pieces(part: Part, source: MappedFile | None) -> Iterator[tuple[int, int, Any]]:
    """(start, stop, what copies it or None) of all rows of a part that has any."""
    if source is not None:
        try:
            columns = Columns(source)
            source.check(0, source.num_bytes)
        except DataError as error:
            warn_without(error)
        else:
            for stripe in columns.stripes:
                start, stop = stripe.start, stripe.start + stripe.num_rows
                count = int(np.count_nonzero(part.kept_N[start:stop]))
                if 2 * count >= STRIPE_ROWS:
                    yield start, stop, lambda kept_S, writer, stripe=stripe: columns.copied(stripe, kept_S, writer)
                elif count:
                    yield start, stop, None
            source.let_go()
            return
    if part.num_rows:
        yield 0, len(part.segment), None
