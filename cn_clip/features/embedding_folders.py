"""Folders as clip-retrieval keeps vectors: `img_emb`, `text_emb` and `metadata`, of numbered npy and Parquet files.

Row n of the npy file of a number belongs to row n of the Parquet file of this number. `files` reads them like feature
files; `cn-clip convert` writes them.
"""

# B rows of a block, D embedding

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.data.paths import readable
from cn_clip.data.records import RecordId, plain_id
from cn_clip.digests import is_folder
from cn_clip.errors import DataError, reading
from cn_clip.features.rows import Block, FloatArray, IdField, first_not_finite
from cn_clip.features.tables import columns_beside, require_parquet, values_beside
from cn_clip.files import atomic_write

FOLDERS: dict[IdField, str] = {"image_id": "img_emb", "text_id": "text_emb"}
METADATA = "metadata"
IMAGE_PATH, CAPTION, ID = "image_path", "caption", "id"
# Rows of one file, and those that are read at once.
ROWS_A_FILE, _BLOCK_ROWS = 65536, 16384
_STEP = "write the folder again"


def is_embedding_folder(path: Path) -> bool:
    """Whether a folder holds vectors of pictures or texts in such files; raises UnreadableError."""
    return any(is_folder(path / name) and any((path / name).glob("*.npy")) for name in FOLDERS.values())


def embedding_files(folder: Path) -> list[Path]:
    """All files of such a folder that are read."""
    return [file for name in (*FOLDERS.values(), METADATA) for file in _numbered(folder / name)]


def embedding_blocks(folder: Path, field: IdField) -> Iterator[Block]:
    """The rows in the order of the numbers of the files, block by block.

    The id of a row is what the column `id` says, which `write_embedding_folder` adds, else the path of a picture, else
    the number of the row, from 0. Raises DataError, naming the file, where files are missing, damaged or of other
    lengths; MissingExtraError without pyarrow.
    """
    files, tables = _numbered(folder / FOLDERS[field]), _numbered(folder / METADATA)
    if not files:
        other = ", ".join(name for name in FOLDERS.values() if is_folder(folder / name))
        raise DataError(f"has no folder {FOLDERS[field]}, only {other}; is it of the other modality?", at=folder)
    if tables and len(tables) != len(files):
        raise DataError(f"has {len(files)} files in {FOLDERS[field]} and {len(tables)} in {METADATA}", at=folder)
    start, width = 0, 0
    for number, file in enumerate(files):
        rows = _opened(file)
        width = width or rows.shape[1]
        if rows.shape[1] != width:
            raise DataError(f"has vectors of {rows.shape[1]} numbers, the files before have {width}", at=file)
        columns = _columns(tables[number], len(rows)) if tables else iter(lambda: {}, None)
        for first in range(0, len(rows), _BLOCK_ROWS):
            vectors_BD = _block(file, rows, first)
            beside = dict(next(columns))
            yield Block(_ids(beside, field, start + first, len(vectors_BD)), vectors_BD, beside)
        start += len(rows)


def _numbered(folder: Path) -> list[Path]:
    """The files of a folder by their numbers."""
    if not is_folder(folder):
        return []
    found = [file for file in folder.iterdir() if file.suffix in (".npy", ".parquet")]
    return sorted(found, key=lambda file: (int((re.findall(r"\d+", file.stem) or ["0"])[-1]), file.name))


def _opened(file: Path) -> NDArray[np.floating]:
    with reading(file, DataError, what="cannot be read as npy", step=_STEP):
        rows: NDArray[np.floating] = np.load(file, mmap_mode="r", allow_pickle=False)
    if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.shape[1]:
        raise DataError(f"expected floats of the shape (N, D), got {rows.dtype} {rows.shape}", at=file)
    return rows


def _block(file: Path, rows: NDArray[np.floating], first: int) -> FloatArray:
    with np.errstate(over="ignore"):
        vectors_BD = np.ascontiguousarray(rows[first : first + _BLOCK_ROWS], dtype=np.float32)
    if (faulty := first_not_finite(vectors_BD)) is not None:
        raise DataError(f"row {first + faulty + 1}: holds NaN or infinity; expected finite numbers", at=file)
    return vectors_BD


def _columns(file: Path, num_rows: int) -> Iterator[Mapping[str, Sequence[Any]]]:
    """The columns of a Parquet file that JSON holds, as many rows at a time as `_block` gives."""
    arrow, parquet = require_parquet()
    with reading(file, DataError, what="cannot be read as Parquet", step=_STEP), parquet.ParquetFile(file) as table:
        if table.metadata.num_rows != num_rows:
            raise DataError(f"has {table.metadata.num_rows} rows, its vectors are {num_rows}", at=file)
        names = columns_beside(arrow, file, table.schema_arrow, "image_id")
        held: Any = None
        for batch in itertools.chain(table.iter_batches(_BLOCK_ROWS, columns=names), [None]):
            part = None if batch is None else arrow.Table.from_batches([batch])
            held = part if held is None else held if part is None else arrow.concat_tables([held, part])
            while held is not None and len(held) and (len(held) >= _BLOCK_ROWS or batch is None):
                piece, held = held.slice(0, _BLOCK_ROWS), held.slice(_BLOCK_ROWS)
                yield {name: values_beside(piece.column(name).to_pylist(), False) for name in names}


def _ids(columns: dict[str, Any], field: IdField, start: int, count: int) -> list[RecordId]:
    """The ids of a block, whose columns get the names that an index knows."""
    given = columns.pop(ID, None)
    paths = columns.pop(IMAGE_PATH, None)
    if paths is not None:
        columns["path"] = paths
    if given is None:
        given = paths if field == "image_id" else None
    if given is None or any(type(one) not in (int, str) for one in given):
        return list(range(start, start + count))
    return list(map(plain_id, given))


def write_embedding_folder(
    folder: Path, field: IdField, blocks: Iterable[Block], names: Sequence[str], dtype: "np.dtype[Any] | type"
) -> int:
    """Writes rows into an existing folder, `ROWS_A_FILE` in each file; returns how many.

    names: of the columns of the metadata besides `id`, `image_path` and `caption`, the same in every file.
    """
    require_parquet()
    for name in (FOLDERS[field], METADATA):
        (folder / name).mkdir()
    num_rows = 0
    for number, block in enumerate(_regrouped(blocks, ROWS_A_FILE)):
        with atomic_write(folder / FOLDERS[field] / f"{FOLDERS[field]}_{number:05}.npy", "wb") as stream:
            np.lib.format.write_array(stream, block.vectors.astype(dtype, copy=False), allow_pickle=False)
        _write_metadata(folder / METADATA / f"{METADATA}_{number:05}.parquet", block, names)
        num_rows += len(block.ids)
    return num_rows


def _regrouped(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """The same rows, `size` in each block but the last."""
    held: list[Block] = []
    for block in blocks:
        rest = block
        while sum(len(one.ids) for one in held) + len(rest.ids) >= size:
            room = size - sum(len(one.ids) for one in held)
            yield _joined([*held, _part(rest, slice(0, room))])
            held, rest = [], _part(rest, slice(room, None))
        if len(rest.ids):
            held.append(rest)
    if held:
        yield _joined(held)


def _part(block: Block, part: slice) -> Block:
    columns = {name: values[part] for name, values in block.columns.items()}
    return Block(block.ids[part], block.vectors[part], columns)


def _joined(blocks: Sequence[Block]) -> Block:
    names = dict.fromkeys(name for block in blocks for name in block.columns)
    columns = {
        name: [value for block in blocks for value in block.columns.get(name, [None] * len(block.ids))]
        for name in names
    }
    ids = [one for block in blocks for one in block.ids]
    return Block(ids, np.concatenate([block.vectors for block in blocks]), columns)


def _write_metadata(path: Path, block: Block, names: Sequence[str]) -> None:
    arrow, parquet = require_parquet()
    ids = [readable(one) for one in block.ids]
    nothing = [None] * len(ids)
    paths = block.columns.get("path", nothing)
    columns: dict[str, Any] = {
        IMAGE_PATH: arrow.array(
            [str(one if found is None else readable(found)) for one, found in zip(ids, paths, strict=True)]
        ),
        CAPTION: _text_column(arrow, ["" if one is None else one for one in block.columns.get(CAPTION, nothing)]),
        ID: arrow.array(ids) if len({type(one) for one in ids}) == 1 else arrow.array(list(map(str, ids))),
    }
    for name in names:
        if name not in (*columns, "path"):
            columns[name] = _column(arrow, block.columns.get(name, nothing))
    with atomic_write(path, "wb") as stream:
        parquet.write_table(arrow.table(columns), stream)


def _column(arrow: Any, values: Sequence[Any]) -> Any:
    """Numbers and booleans as such where all are of one kind, else text."""
    kinds = {type(one) for one in values if one is not None}
    return arrow.array(values) if len(kinds) == 1 and kinds <= {int, float, bool} else _text_column(arrow, values)


def _text_column(arrow: Any, values: Sequence[Any]) -> Any:
    texts = [
        one if one is None or isinstance(one, str) else json.dumps(one, ensure_ascii=False)
        for one in map(readable, values)
    ]
    return arrow.array(texts, type=arrow.string())
