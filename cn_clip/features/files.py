"""Feature files, one vector an id: JSONL (Chinese-CLIP's), npz and Parquet; written by the extraction commands."""

# N rows, D embedding

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson

from cn_clip import progress as bars
from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError, Where
from cn_clip.features import tables
from cn_clip.features.embedding_folders import embedding_blocks, is_embedding_folder
from cn_clip.features.options import OutputFormat
from cn_clip.features.rows import Block, Blocks, Features, FloatArray, IdField, check_unique
from cn_clip.features.store import read_shards
from cn_clip.features.tables import parquet_blocks
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps, numbered_lines, parse_object
from cn_clip.language import both

__all__ = ["Features", "IdField", "feature_blocks", "read_features", "write_features", "write_rows"]

_BEGINNINGS: dict[OutputFormat, bytes] = {"npz": b"PK", "parquet": b"PAR1"}
# What is mistaken for a feature file: its first bytes, what it is and what to do.
_FOREIGN: dict[bytes, str] = {
    b"\x93NUMPY": "is an npy file, which has no ids; save ids and features with np.savez",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
_READERS: dict[OutputFormat, tables.Read] = {"npz": tables.read_npz, "parquet": tables.read_parquet}
_WRITERS: dict[OutputFormat, tables.Write] = {"npz": tables.write_npz, "parquet": tables.write_parquet}
_NUMBERS = {int, float}


def write_rows(
    path: str | os.PathLike[str],
    field: IdField,
    ids: Sequence[RecordId],
    blocks: Blocks,
    *,
    embed_dim: int,
    output_format: OutputFormat,
) -> None:
    """Writes a feature file from blocks of float32 rows (B, D) in the order of `ids`; it appears whole or not at all.

    Raises DataError when the folder is missing, MissingExtraError for Parquet without pyarrow.
    """
    if output_format == "jsonl":
        rest = iter(ids)
        write_features(path, field, ((list(itertools.islice(rest, len(block))), block) for block in blocks))
    else:
        _WRITERS[output_format](path, field, ids, blocks, embed_dim)


def read_features(path: str | os.PathLike[str], field: IdField, *, progress: bool = False) -> Features:
    """Reads a feature file of any of the formats, recognised by its first bytes, or a folder of Parquet shards or of
    clip-retrieval.

    Raises DataError with file and line (JSONL) or row, counted from 1, for an id that came before or is neither int nor
    str, a vector that is empty, not finite or of another length, a damaged file, the file of the other modality, and
    one without rows; MissingExtraError for Parquet without pyarrow.
    """
    if Path(path).is_dir():
        if is_embedding_folder(Path(path)):
            blocks = list(embedding_blocks(Path(path), field))
            ids = [one for block in blocks for one in block.ids]
            check_unique(ids, path, field)
            return Features(ids, np.concatenate([block.vectors for block in blocks]))
        return read_shards(Path(path), field)
    beginning = _beginning(path)
    for known, magic in _BEGINNINGS.items():
        if beginning.startswith(magic):
            return _READERS[known](path, field)
        if Path(path).suffix.lower() == f".{known}":
            raise DataError(f"is no {known} file, though its name says so; extract it again", at=path)
    for magic, what in _FOREIGN.items():
        if beginning.startswith(magic):
            raise DataError(what, at=path)
    return _read_lines(path, field, progress=progress)


def feature_blocks(path: str | os.PathLike[str], field: IdField) -> Iterator[Block]:
    """As `read_features`, but block by block where it can be, so that a collection of any size fits into memory.

    A file, or a folder of clip-retrieval; for folders of shards see `store.ShardFolder`. The caller looks for ids that
    come twice, and for vectors of two lengths; a file that is neither such a folder nor Parquet is one block.
    """
    if Path(path).is_dir() and is_embedding_folder(Path(path)):
        yield from embedding_blocks(Path(path), field)
    elif _beginning(path).startswith(_BEGINNINGS["parquet"]):
        yield from parquet_blocks(path, field)
    else:
        yield Block(*read_features(path, field), {})


def _beginning(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(8)
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror})", at=path) from error


# --- JSONL


def write_features(
    path: str | os.PathLike[str], field: IdField, batches: Iterable[tuple[Sequence[RecordId], FloatArray]]
) -> int:
    """Writes (ids, float32 vectors, one row an id) batch by batch; the file appears whole or not at all.

    Numbers are the float32 values in Python's shortest float form. Returns the number of lines.
    Raises DataError when the folder is missing or a batch has other numbers of ids and rows.
    """
    num_lines = 0
    with atomic_write(path) as stream:
        for ids, vectors in batches:
            if len(ids) != len(vectors):
                raise DataError(f"a batch has {len(ids)} ids and {len(vectors)} vectors", at=path)
            for item_id, vector in zip(ids, vectors.astype(np.float32, copy=False), strict=True):
                stream.write(dumps({field: item_id, "feature": vector.tolist()}) + "\n")
            num_lines += len(ids)
    return num_lines


def _read_lines(path: str | os.PathLike[str], field: IdField, *, progress: bool = False) -> Features:
    """Reads every line but blank ones; ids are as `plain_id` gives them, JSON numbers are rounded to float32.

    Raises DataError with file and line for a line that is no JSON object, lacks `field` or "feature", has an id that
    is neither int nor str or came before, or a vector that is empty, not of numbers, not finite or of another length
    than the first; and for a missing or empty file.
    """
    numbers: list[int] = []
    ids: list[RecordId] = []
    rows: list[FloatArray] = []
    with bars.progress(_size(path), "B", _reading(path), in_bytes=True, when=progress) as bar:
        for number, line in numbered_lines(path):
            bar.advance(len(line) + 1)
            where = Where(path, line=number)
            item_id, vector = _read_line(line, field, where)
            if rows and len(vector) != len(rows[0]):
                raise DataError(
                    f"has {len(vector)} numbers, the lines before have {len(rows[0])}", at=where.of("feature")
                )
            if not np.isfinite(vector).all():
                raise DataError("holds NaN or infinity; expected finite float32 numbers", at=where.of("feature"))
            numbers.append(number)
            ids.append(item_id)
            rows.append(vector)
    if not rows:
        raise DataError(f"the file has no lines; expected one JSON object with {field} and feature a line", at=path)
    check_unique(ids, path, field, numbers=numbers, unit="line")
    return Features(ids, np.stack(rows))


def _reading(path: str | os.PathLike[str]) -> str:
    return both(f"读取 {os.path.basename(path)}", f"reading {os.path.basename(path)}")


def _size(path: str | os.PathLike[str]) -> int | None:
    with contextlib.suppress(OSError):
        return os.path.getsize(path) or None
    return None


def _read_line(line: bytes, field: IdField, where: Where) -> tuple[RecordId, FloatArray]:
    """The id and the vector (D,) of a line; raises as `_read_lines`."""
    try:
        record = orjson.loads(line)
        item_id, values = record[field], record["feature"]
        if type(item_id) in (int, str) and set(map(type, values)) <= _NUMBERS and values:
            with np.errstate(over="ignore"):
                return plain_id(item_id), np.array(values, dtype=np.float32)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    # Either no such line, or one that orjson does not take: NaN, integers beyond 64 bits. `json` says what is wrong.
    record = parse_object(line, where)
    if field not in record:
        raise DataError(f"no field {field}, only {sorted(record)}; is this the file of the other modality?", at=where)
    item_id = record[field]
    if type(item_id) not in (int, str):
        raise DataError(f"expected an integer or a string, got {item_id!r}", at=where.of(field))
    if "feature" not in record:
        raise DataError(f"no field feature, only {sorted(record)}; expected a list of numbers", at=where)
    values = record["feature"]
    if not isinstance(values, list) or not values:
        raise DataError(f"expected a list of numbers, got {str(values)[:40]!r}", at=where.of("feature"))
    for position, value in enumerate(values):
        if type(value) not in _NUMBERS:
            raise DataError(f"expected numbers, got {value!r} at position {position}", at=where.of("feature"))
    try:
        with np.errstate(over="ignore"):
            return plain_id(item_id), np.array(values, dtype=np.float32)
    except OverflowError as error:
        raise DataError("a number is too large for float32", at=where.of("feature")) from error
