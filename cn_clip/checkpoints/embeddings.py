"""Vectors for clip-retrieval: an index or a feature file as its folders; `convert` calls it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cn_clip import files
from cn_clip.data.storage import open_storage
from cn_clip.errors import ConfigError, DataError
from cn_clip.features.embedding_folders import FOLDERS, is_embedding_folder, write_embedding_folder
from cn_clip.features.files import feature_blocks
from cn_clip.features.rows import Block, IdField
from cn_clip.features.store import ShardFolder, is_shard_folder
from cn_clip.features.tables import THUMBNAIL_COLUMN
from cn_clip.retrieval import addresses
from cn_clip.retrieval.addresses import Searchable, open_index
from cn_clip.retrieval.schemes import address_of

# How an index finds a file again: of no use elsewhere.
_HIDDEN = frozenset({"source", "size", "mtime_ns", "digest", "table_fields"})
_BLOCK_ROWS = 4096


def write(source: str, target: Path, *, half: bool) -> int:
    """Writes the folders of an index, or of a feature file of pictures or texts; returns how many rows.

    half: as float16, as clip-retrieval itself does. Memory: the rows of one file. Raises DataError for a source that
    is neither, ConfigError for a target in it.
    """
    files.refuse_inputs("TARGET", target, [source])
    if Path(source).resolve() in target.resolve().parents:
        raise ConfigError(f"TARGET {target}: is inside {source}, which is read; give another path")
    dtype = np.float16 if half else np.float32
    address = address_of(source)
    if addresses.facts(address) is not None:
        index = open_index(address)
        names = _fields_of(index)
        with files.staged_folder(target) as folder:
            return write_embedding_folder(folder, "image_id", _blocks_of(index, names), names, dtype)
    field, first, blocks = _features(Path(source))
    names = sorted(set(first.columns) - {THUMBNAIL_COLUMN})
    with files.staged_folder(target) as folder:
        return write_embedding_folder(folder, field, blocks, names, dtype)


def _fields_of(index: Searchable) -> list[str]:
    """The columns besides the id: all fields, of an index on a server those of its first items."""
    first = next(index.vector_blocks(_BLOCK_ROWS), None)
    seen = [] if first is None else [name for known in first[1] for name in known]
    return [name for name in dict.fromkeys(["path", *sorted({*index.fields, *seen})]) if name not in _HIDDEN]


def _blocks_of(index: Searchable, names: list[str]) -> Iterator[Block]:
    for ids, known, vectors in index.vector_blocks(_BLOCK_ROWS):
        yield Block(ids, vectors, {name: [one.get(name) for one in known] for name in names})


def _features(path: Path) -> tuple[IdField, Block, Iterator[Block]]:
    """(pictures or texts, the first rows of a file, all of them); raises DataError, of pictures, when it is neither."""
    if is_embedding_folder(path):
        raise DataError("is a folder of clip-retrieval already", at=path)
    fault: DataError | None = None
    for field in FOLDERS:
        blocks = _blocks(path, field)
        try:
            first = next(blocks, None)
        except DataError as error:
            fault = fault or error
            continue
        if first is None:
            raise DataError("has no rows; extract it again", at=path)
        return field, first, itertools.chain([first], blocks)
    assert fault is not None
    raise fault


def _blocks(path: Path, field: IdField) -> Iterator[Block]:
    if not is_shard_folder(path):
        yield from feature_blocks(path, field)
        return
    opened = ShardFolder.opened(open_storage(str(path)), field)
    for shard in opened.shards:
        yield from opened.blocks(shard)
    opened.confirm()
