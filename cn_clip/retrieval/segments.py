"""Segments of an index: folders of consecutive rows that never change; `store` reads and `writer` writes them."""

# N rows, D dimensions

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.files import sync_folder
from cn_clip.retrieval.manifest import ADVICE, SegmentFacts, VectorType, check_size, facts_of

ItemId: TypeAlias = int | str
Metadata: TypeAlias = Mapping[str, Any]
FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]

VECTORS, ITEMS, THUMBNAILS, ROWS = "vectors.npy", "items.jsonl", "thumbnails.bin", "rows.npy"
# Columns of rows.npy.
KEY, ITEM_END, THUMBNAIL_END = range(3)


@dataclass(frozen=True)
class Row:
    """A row to write: a vector of D numbers, and the bytes that go with it. item: a line of JSON, without its end."""

    key: int
    vector_D: NDArray[np.floating]
    item: bytes
    thumbnail: bytes = b""


def item_line(item_id: ItemId, metadata: Metadata) -> bytes:
    """How an item lies in a segment; raises DataError for an id or metadata that JSON cannot hold."""
    if type(item_id) not in (int, str):
        raise DataError(f"an id is an int or a str, got {item_id!r}")
    try:
        return json.dumps({"id": item_id, "metadata": dict(metadata)}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"id {item_id!r}: its metadata is nothing that JSON holds ({error})") from error


def write_segment(folder: Path, rows: Iterable[Row], num_rows: int, embed_dim: int, vector_type: VectorType) -> None:
    """Writes `num_rows` rows into `folder`, which must not exist; raises OSError. Memory: a row."""
    folder.mkdir()
    table_N3 = np.empty((num_rows, 3), dtype=np.int64)
    with (
        open(folder / VECTORS, "wb") as vectors,
        open(folder / ITEMS, "wb") as items,
        open(folder / THUMBNAILS, "wb") as thumbnails,
    ):
        # No memory map: of a full disk that says nothing but SIGBUS.
        _write_header(vectors, np.dtype(vector_type), (num_rows, embed_dim))
        for place, row in enumerate(rows):
            vectors.write(row.vector_D.astype(vector_type).tobytes())
            items.write(row.item + b"\n")
            thumbnails.write(row.thumbnail)
            table_N3[place] = row.key, items.tell(), thumbnails.tell()
    with open(folder / ROWS, "wb") as stream:
        _write_header(stream, table_N3.dtype, table_N3.shape)
        stream.write(table_N3.tobytes())
    for path in folder.iterdir():
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def _write_header(stream: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, facts)


def facts_of_segment(folder: Path, num_rows: int) -> SegmentFacts:
    """What the manifest says of a segment that has just been written."""
    files = {name: facts_of(folder / name) for name in (VECTORS, ITEMS, THUMBNAILS, ROWS)}
    return SegmentFacts(folder.name, num_rows, files)


class Segment:
    """A segment, memory-mapped: it can be read on when the folder is removed."""

    def __init__(self, folder: Path, facts: SegmentFacts, embed_dim: int) -> None:
        """Raises DataError naming the file that is missing or not what the manifest says."""
        self.folder = folder
        for name in (VECTORS, ITEMS, THUMBNAILS, ROWS):
            if name not in facts.files:
                raise DataError(f"{folder / name}: is not in the manifest; {ADVICE}")
            check_size(folder / name, facts.files[name])
        self.vectors_ND: NDArray[np.floating] = _mapped_array(folder / VECTORS, (facts.num_rows, embed_dim))
        table_3N = np.array(_mapped_array(folder / ROWS, (facts.num_rows, 3)).T, order="C")
        self.keys_N: IntArray = table_3N[KEY]
        self._item_ends, self._thumbnail_ends = table_3N[ITEM_END], table_3N[THUMBNAIL_END]
        self._items, self._thumbnails = _mapped(folder / ITEMS), _mapped(folder / THUMBNAILS)

    def __len__(self) -> int:
        return len(self.keys_N)

    def item(self, row: int) -> tuple[ItemId, dict[str, Any]]:
        """(id, metadata); raises DataError for a damaged line."""
        try:
            return _parsed(self.item_bytes(row))
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(f"{self.folder / ITEMS}:{row + 1}", error) from error

    @staticmethod
    def parse(line: bytes, where: str) -> tuple[ItemId, dict[str, Any]]:
        """(id, metadata) of a line of an items.jsonl; raises DataError that starts with `where`."""
        try:
            return _parsed(line)
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(where, error) from error

    def item_bytes(self, row: int) -> bytes:
        """The line of an item, without its end."""
        return _piece(self._items, self._item_ends, row)[:-1]

    def thumbnail(self, row: int) -> bytes:
        """A JPEG file, or nothing."""
        return _piece(self._thumbnails, self._thumbnail_ends, row)

    def rows(self, places: Sequence[int] | IntArray) -> Iterator[Row]:
        """Rows to write elsewhere."""
        for place in places:
            index = int(place)
            yield Row(int(self.keys_N[index]), self.vectors_ND[index], self.item_bytes(index), self.thumbnail(index))


def _parsed(line: bytes) -> tuple[ItemId, dict[str, Any]]:
    values = json.loads(line)
    item_id, metadata = values["id"], values["metadata"]
    if type(item_id) not in (int, str) or not isinstance(metadata, dict):
        raise TypeError(f"id {item_id!r}")
    return item_id, metadata


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where} is damaged ({error}); {ADVICE}")


def _piece(data: bytes | mmap.mmap, ends_N: IntArray, row: int) -> bytes:
    start = int(ends_N[row - 1]) if row else 0
    return bytes(data[start : int(ends_N[row])])


def _mapped(path: Path) -> bytes | mmap.mmap:
    try:
        with open(path, "rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                return b""
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from error


def _mapped_array(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {ADVICE}") from error
    if array.shape != shape:
        raise DataError(f"{path}: expected rows of the shape {shape}, got {array.shape}; {ADVICE}")
    return array
