"""Feature files, one vector an id: JSONL (Chinese-CLIP's), npz and Parquet; written by the extraction commands."""

# N rows, D embedding

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cn_clip.data.records import RecordId
from cn_clip.errors import DataError
from cn_clip.features import lines, shards, tables
from cn_clip.features.formats import OutputFormat
from cn_clip.features.lines import write_features
from cn_clip.features.rows import Blocks, Features, FloatArray, IdField

__all__ = ["Features", "IdField", "read_features", "write_features", "write_rows"]

_BEGINNINGS: dict[OutputFormat, bytes] = {"npz": b"PK", "parquet": b"PAR1"}
# What is mistaken for a feature file: its first bytes, what it is and what to do.
_FOREIGN: dict[bytes, str] = {
    b"\x93NUMPY": "is an npy file, which has no ids; save ids and features with np.savez",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
_READERS: dict[OutputFormat, tables.Read] = {
    "npz": tables.read_npz,
    "parquet": tables.read_parquet,
}
_WRITERS: dict[OutputFormat, tables.Write] = {
    "npz": tables.write_npz,
    "parquet": tables.write_parquet,
}


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
        write_features(path, field, _with_ids(ids, blocks))
    else:
        _WRITERS[output_format](path, field, ids, blocks, embed_dim)


def _with_ids(ids: Sequence[RecordId], blocks: Blocks) -> Iterator[tuple[Sequence[RecordId], FloatArray]]:
    start = 0
    for block in blocks:
        yield ids[start : start + len(block)], block
        start += len(block)


def read_features(path: str | os.PathLike[str], field: IdField, *, progress: bool = False) -> Features:
    """Reads a feature file of any of the formats, which its first bytes tell, or a folder of Parquet shards.

    Raises DataError with file and line (JSONL) or row, counted from 1, for an id that came before or is neither int nor
    str, a vector that is empty, not finite or of another length, a damaged file, the file of the other modality, and
    one without rows; MissingExtraError for Parquet without pyarrow.
    """
    if Path(path).is_dir():
        return shards.read_shards(Path(path), field)
    beginning = _first_bytes(path)
    for known, magic in _BEGINNINGS.items():
        if beginning.startswith(magic):
            return _READERS[known](path, field)
        if Path(path).suffix.lower() == f".{known}":
            raise DataError(f"is no {known} file, though its name says so; extract it again", at=path)
    for magic, what in _FOREIGN.items():
        if beginning.startswith(magic):
            raise DataError(f"{what}", at=path)
    return lines.read_lines(path, field, progress=progress)


def _first_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(8)
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror})", at=path) from error
