"""Brings vectors that were computed before, a feature file or shards, into an index; `ingest` knows pictures."""

# N rows, B rows of a block, D embedding

import contextlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cn_clip.clip.pictures import opened
from cn_clip.clip.thumbnails import thumbnail
from cn_clip.command import Speaker
from cn_clip.data.records import digest_of
from cn_clip.data.storage import open_storage
from cn_clip.errors import ConfigError, DataError
from cn_clip.features.embedding_folders import embedding_files
from cn_clip.features.files import feature_blocks
from cn_clip.features.rows import Block, check_unique
from cn_clip.features.store import Shard, ShardFolder
from cn_clip.features.tables import PATH_COLUMN, THUMBNAIL_COLUMN
from cn_clip.index.deciding import parted
from cn_clip.index.ingest import Summary
from cn_clip.index.jobs import Job, Model, changing, finish
from cn_clip.index.options import SourceOptions
from cn_clip.index.progress import Progress
from cn_clip.index.sources import CAPTION_COLUMN, OWN_FIELDS, Table, is_shards, refuse_excludes, row_of
from cn_clip.index.telling import refuse_interrupted, say_summary
from cn_clip.language import both, counted
from cn_clip.retrieval.addresses import Writer
from cn_clip.retrieval.ids import HashArray, coming_twice, hashes_of
from cn_clip.retrieval.manifest import ModelInfo
from cn_clip.retrieval.scanning import norms
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.writer import NewItem
from cn_clip.secret import as_typed
from cn_clip.stopping import StopRequest

# Of features that were rounded to 16 bits.
UNIT_LENGTH_TOLERANCE = 1e-3
VECTORS_A_COMMIT = 65536
# Vectors of so many bytes are kept from the first reading for the second.
_LARGEST_KEPT = 1 << 28
# Shards of at most so many bytes are read ahead, several at a time: a store answers late, but many at once.
_LARGEST_AHEAD, _READ_AHEAD = 1 << 25, 4
# What the commands write into the metadata and a column may say as well.
_OF_COLUMNS = {PATH_COLUMN, "width", "height"}
# The line of the notes of an index that says which shards are in it; see `_Resumption`.
_SHARDS = "shards"


def add_features(options: SourceOptions, job: Job, model: Model, table: Table | None, say: Speaker) -> None:
    """Adds the rows of the job's features; raises CnClipError, with all kept that was reported done.

    A faulty file changes nothing: it is read twice, first to see that it is right. Of shards, what is of another model
    or missing is found before anything is changed, a damaged row when its shard is read; those before it are kept, and
    a run that was killed goes on with the shard where it was. Memory: a commit, of a file also 8 bytes a row.
    """
    refuse_excludes(job.source, options.exclude)
    if options.min_size:
        raise ConfigError(f"--min-size {options.min_size}: is for pictures; leave it out", at=job.source)
    source: _Source = _Shards.examined(job) if is_shards(job.source) else _File.examined(_path(job), job.id_prefix)
    info = _model_of_features(options, job, model, source.embed_dim)
    summary, progress, stop = Summary(), Progress(say), StopRequest()
    with changing(job, info, source.embed_dim, source.name, source) as writer:
        before = writer.manifest.source
        if source.num_scaled:
            say.note(_told_scaled(job, source.num_scaled))
        settings = digest_of([job.id_prefix, options.metadata and _state(Path(options.metadata))])
        resumption = _Resumption(writer, source, settings)
        summary.unchanged = source.num_rows_of(resumption.first)
        if resumption.first:
            say.note(
                both(
                    f"{job.source}: 前 {resumption.first} 个分片已在索引里，从下一个继续",
                    f"{job.source}: the first {resumption.first} shards are in the index; going on with the next",
                )
            )
        with stop.noted(), progress.over(len(source), done=summary.unchanged):
            size = options.commit_every or VECTORS_A_COMMIT
            for commit in stop.until(source.commits(size, resumption.first)):
                items, num_new = _new_items(commit, writer, table, job.id_prefix, source.name)
                writer.commit(items, notes=resumption.notes(commit.num_shards, num_new))
                summary.unchanged += len(commit.ids) - len(items)
                summary.added += len(items)
                progress.advance(len(commit.ids))
                progress.saved(summary.num_done, summary.added)
        summary.signal = stop.number
        if summary.signal is None:
            source.confirm()
            _remove_missing(job, writer, source, {source.name, before}, summary)
            if resumption.notes_at_end is not None:
                writer.commit(notes=resumption.notes_at_end)
            finish(writer, job, source.name)
    say_summary(summary, writer, job, say)
    refuse_interrupted(summary, job, num_items=len(writer))


def _path(job: Job) -> Path:
    assert isinstance(job.source, Path), "an address is one of shards"
    return job.source


def _told_scaled(job: Job, number: int) -> str:
    return both(
        f"{job.source}: {number} 行的长度不是 1，已归一化",
        f"{job.source}: normalised {counted(number, 'row')} whose length was not 1",
    )


def _remove_missing(job: Job, writer: Writer, source: "_Source", names: set[str], summary: Summary) -> None:
    """All rows of the source are items by now: if there are no more items, none is to be removed."""
    if len(writer) < len(source):
        raise DataError(
            f"{counted(len(source) - len(writer), 'row')} came with an id that another shard has, and replaced its "
            "row; extract it again",
            at=job.source,
        )
    if job.is_sync and not job.keep_missing and len(writer) > len(source):
        summary.removed = [
            one for one, metadata in writer.items() if one not in source and metadata.get("source") in names
        ]
        writer.commit(remove=summary.removed)


def _new_items(
    commit: "_Commit", writer: Writer, table: Table | None, id_prefix: str, name: str
) -> tuple[list[NewItem], int]:
    """(the items of a commit that the index has not as they are, how many of them it has not at all)."""
    items, stored = [], writer.stored(commit.ids)
    if len(set(commit.ids)) < len(commit.ids):
        twice = next(one for one, number in Counter(commit.ids).items() if number > 1)
        raise DataError(f"image_id {twice!r} comes twice, in two shards; extract it again", at=name)
    for item_id, vector_D, (beside, small) in zip(commit.ids, commit.vectors_BD, commit.beside, strict=True):
        had = stored.get(item_id)
        kept = parted(had.metadata if had else {})[1]
        row = row_of(table, item_id, id_prefix) if table is not None else kept
        # Without what only pictures have: vectors of a file are not those of the bytes of a digest.
        metadata = {field: value for field, value in (row or {}).items() if field not in OWN_FIELDS}
        largest = writer.largest_thumbnail
        if largest is not None and len(small) > largest:
            small = _made_smaller(small, largest)
        given = {**metadata, **beside} if table is None else {**beside, **metadata}
        item = NewItem(item_id, vector_D, {**given, "source": name}, small)
        if had is None or not _is_same(item, had):
            items.append(item)
    return items, sum(one.id not in stored for one in items)


def _made_smaller(data: bytes, largest: int) -> bytes:
    """A thumbnail of at most so many bytes, b"" for what is no picture."""
    with contextlib.suppress(Exception), opened(data) as image:  # what PIL's plugins raise has no common type
        return thumbnail(image, max(image.size), largest)
    return b""


# --- where rows come from


class _Commit(NamedTuple):
    """Rows that are written together. beside: (metadata, thumbnail) of each.

    num_shards: so many shards are in the index as a whole once these rows are.
    """

    ids: list[ItemId]
    vectors_BD: FloatArray
    beside: list[tuple[Mapping[str, Any], bytes]]
    num_shards: int


def _commits(blocks: Iterable[tuple[Block, int]], size: int, *, id_prefix: str, path: object) -> Iterator[_Commit]:
    """Rows of length 1, so many at a time. blocks: each with how many shards have ended with it."""
    ids: list[ItemId] = []
    parts: list[FloatArray] = []
    beside: list[tuple[Mapping[str, Any], bytes]] = []
    ends, num_seen, num_given, num_whole = deque[tuple[int, int]](), 0, 0, 0

    def whole() -> int:
        nonlocal num_whole
        while ends and ends[0][0] <= num_given:
            num_whole = ends.popleft()[1]
        return num_whole

    for block, num_shards in blocks:
        vectors_BD = _of_unit_length(block, path)[0]
        ids += [f"{id_prefix}{one}" if id_prefix else one for one in block.ids]
        parts.append(vectors_BD)
        beside += _beside(block)
        num_seen += len(block.ids)
        ends.append((num_seen, num_shards))
        while len(ids) >= size:
            whole_BD = np.concatenate(parts)
            num_given += size
            yield _Commit(ids[:size], whole_BD[:size], beside[:size], whole())
            ids, parts, beside = ids[size:], [whole_BD[size:]], beside[size:]
    if ids:
        num_given += len(ids)
        yield _Commit(ids, np.concatenate(parts), beside, whole())


def _beside(block: Block) -> list[tuple[Mapping[str, Any], bytes]]:
    """The metadata of each row of a block, and its thumbnail."""
    columns = {name: values for name, values in block.columns.items() if name != THUMBNAIL_COLUMN}
    if CAPTION_COLUMN in columns:
        columns.setdefault("caption", columns[CAPTION_COLUMN])
    columns = {name: values for name, values in columns.items() if name in _OF_COLUMNS or name not in OWN_FIELDS}
    small = block.columns.get(THUMBNAIL_COLUMN) or [b""] * len(block.ids)
    if not columns:
        return [({}, one or b"") for one in small]
    rows = zip(*columns.values(), strict=True)
    return [
        ({name: value for name, value in zip(columns, row, strict=True) if value not in (None, "")}, one or b"")
        for row, one in zip(rows, small, strict=True)
    ]


@dataclass(frozen=True)
class _File:
    """A feature file that was read once: whether it has an id, and its rows in order; the ids with their prefix.

    kept: the rows, if they are few enough; the hashes of the ids rise. state: of the file when it was first read.
    """

    path: Path
    id_prefix: str
    embed_dim: int
    num_scaled: int
    hashes_N: HashArray
    kept: list[Block] | None
    state: tuple[object, ...]

    @classmethod
    def examined(cls, path: Path, id_prefix: str) -> "_File":
        """Raises DataError for what `commits` could not give."""
        hashes, widths, num_scaled, num_bytes = [], set[int](), 0, 0
        kept: list[Block] | None = []
        state = _state(path)
        for block in feature_blocks(path, "image_id"):
            widths.add(block.vectors.shape[1])
            if len(widths) > 1:
                raise DataError(f"has vectors of {sorted(widths)} numbers; extract it again", at=path)
            num_scaled += _of_unit_length(block, path)[1]
            hashes.append(hashes_of(block.ids))
            num_bytes += block.vectors.nbytes
            kept = [*kept, block] if kept is not None and num_bytes <= _LARGEST_KEPT else None
        if not hashes:
            raise DataError("has no rows; extract it again", at=path)
        hashes_N = np.sort(np.concatenate(hashes))
        file = cls(path, id_prefix, widths.pop(), num_scaled, hashes_N, kept, state)
        twice = coming_twice(hashes_N)
        if twice:
            ids = [one for block in file._blocks() for one in block.ids]
            numbers = [number for number, one in enumerate(hashes_of(ids).tolist()) if one in twice]
            check_unique([ids[one] for one in numbers], path, "image_id", numbers=[one + 1 for one in numbers])
        if id_prefix:
            prefixed = (f"{id_prefix}{one}" for block in file._blocks() for one in block.ids)
            file = replace(file, hashes_N=np.sort(hashes_of(prefixed)))
        return file

    @property
    def name(self) -> str:
        """What the index calls it."""
        return str(self.path.absolute())

    def __len__(self) -> int:
        return len(self.hashes_N)

    def __contains__(self, item_id: object) -> bool:
        return _has(self.hashes_N, item_id)

    def num_rows_of(self, num_shards: int) -> int:
        """A file is read as a whole."""
        del num_shards
        return 0

    def stamps(self, num_shards: int | None = None) -> str:
        """Nothing of a file is passed over."""
        del num_shards
        return ""

    def _blocks(self) -> Iterator[Block]:
        if self.kept is not None:
            yield from self.kept
            return
        self.confirm()
        yield from feature_blocks(self.path, "image_id")
        self.confirm()

    def confirm(self) -> None:
        """Raises DataError when the file was written again since it was read first."""
        if self.kept is None and _state(self.path) != self.state:
            raise DataError(
                "changed while it was read, and what was added may be of both; let it be written to its end, and run "
                "the same command again",
                at=self.path,
            )

    def commits(self, size: int, first: int = 0) -> Iterator[_Commit]:
        """So many rows each; raises DataError for a file that changed meanwhile."""
        del first
        blocks = ((block, 0) for block in self._blocks())
        return _commits(blocks, size, id_prefix=self.id_prefix, path=self.path)


@dataclass(frozen=True)
class _Shards:
    """A folder of shards, local or a URI, whose ends were read: all are of its manifest."""

    folder: ShardFolder
    id_prefix: str
    embed_dim: int
    rows_of: Sequence[int]
    num_scaled: int = 0

    @classmethod
    def examined(cls, job: Job) -> "_Shards":
        """Raises DataError for shards that are missing, damaged at their ends, or of another extraction."""
        folder = ShardFolder.opened(open_storage(as_typed(str(job.source))), "image_id")
        rows_of, widths = list[int](), set[int]()
        for finished, width in folder.widths():
            rows_of.append(finished.num_rows)
            widths |= {width} if width is not None and finished.num_rows else set()
        if not sum(rows_of):
            raise DataError("has no rows; extract it again", at=folder.storage.name)
        if not widths:  # lists of any length
            first = next(shard for shard, number in zip(folder.shards, rows_of, strict=True) if number)
            widths = {next(folder.blocks(first, beside=False)).vectors.shape[1]}
        if len(widths) > 1:
            raise DataError(f"has vectors of {sorted(widths)} numbers; extract it again", at=folder.storage.name)
        return cls(folder, job.id_prefix, widths.pop(), rows_of)

    @property
    def name(self) -> str:
        """What the index calls it."""
        return self.folder.storage.name

    def __len__(self) -> int:
        return sum(self.rows_of)

    @cached_property
    def _hashes(self) -> HashArray:
        """Of all ids, in order; read without the vectors, and only when an index holds more than the shards."""
        ids = (one for shard in self.folder.shards for one in self.folder.ids(shard))
        hashes_N: HashArray = np.sort(hashes_of(f"{self.id_prefix}{one}" if self.id_prefix else one for one in ids))
        return hashes_N

    def __contains__(self, item_id: object) -> bool:
        return _has(self._hashes, item_id)

    def num_rows_of(self, num_shards: int) -> int:
        """Of the first so many shards."""
        return sum(self.rows_of[:num_shards])

    def stamps(self, num_shards: int | None = None) -> str:
        """A digest of the first so many shards, as `ShardFolder.stamps`."""
        return self.folder.stamps(num_shards)

    def confirm(self) -> None:
        """Raises DataError when what was read was written again meanwhile."""
        self.folder.confirm()

    def commits(self, size: int, first: int = 0) -> Iterator[_Commit]:
        """So many rows each, from shard number `first` on; raises DataError for a shard that changed meanwhile."""
        path = self.name
        for commit in _commits(self._blocks(first), size, id_prefix=self.id_prefix, path=path):
            if commit.vectors_BD.shape[1] != self.embed_dim:
                raise DataError(
                    f"has vectors of {sorted({commit.vectors_BD.shape[1], self.embed_dim})} numbers; extract it again",
                    at=path,
                )
            yield commit

    def _blocks(self, first: int) -> Iterator[tuple[Block, int]]:
        def read(shard: Shard) -> list[Block]:
            return list(self.folder.blocks(shard))

        shards = deque(self.folder.shards[first:])
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            ahead: deque[tuple[Shard, Future[list[Block]]]] = deque()
            try:
                while shards or ahead:
                    while shards and len(ahead) < _READ_AHEAD and self._is_small(shards[0]):
                        shard = shards.popleft()
                        ahead.append((shard, pool.submit(read, shard)))
                    if ahead:
                        shard, blocks = ahead[0][0], ahead.popleft()[1].result()
                    else:
                        shard = shards.popleft()
                        blocks = self.folder.blocks(shard)  # type: ignore[assignment]
                    yield from _ended(blocks, shard.number + 1)
            finally:
                for _, one in ahead:
                    one.cancel()

    def _is_small(self, shard: Shard) -> bool:
        return self.folder.files[shard.number].size <= _LARGEST_AHEAD


def _ended(blocks: Iterable[Block], number: int) -> Iterator[tuple[Block, int]]:
    """Each block with the number of shards that have ended with it: `number` for the last one of a shard."""
    last: Block | None = None
    for block in blocks:
        if last is not None:
            yield last, number - 1
        last = block
    if last is not None:
        yield last, number


_Source: TypeAlias = _File | _Shards


def _has(hashes_N: HashArray, item_id: object) -> bool:
    if type(item_id) not in (int, str):
        return False
    (one,) = hashes_of([item_id])  # type: ignore[list-item]
    place = int(np.searchsorted(hashes_N, one))
    return place < len(hashes_N) and bool(hashes_N[place] == one)


class _Resumption:
    """Which shards of a source an index has from a run that did not end; a line of the notes of the index says it.

    The line holds how many shards, a digest of these as they were listed, and how many items there were. What was
    written again since, or removed from the index, is read from the beginning. first: the first shard to read.
    """

    def __init__(self, writer: Writer, source: _Source, settings: str) -> None:
        self._source, self._settings, self._num_items = source, settings, len(writer)
        self._others: list[bytes] = []
        self.first, self._is_noted = 0, False
        for line in writer.notes().splitlines():
            facts: Any = None
            with contextlib.suppress(ValueError):
                facts = json.loads(line)
            if not (isinstance(facts, dict) and _SHARDS in facts):
                self._others.append(line)
                continue
            self._is_noted = True
            number = facts[_SHARDS]
            if type(number) is int and facts == self._facts(number):
                self.first = number

    def _facts(self, number: int) -> Mapping[str, object]:
        source = self._source
        facts = {"of": source.name, "stamps": source.stamps(number), "settings": self._settings}
        return {_SHARDS: number, **facts, "num_items": self._num_items}

    def notes(self, num_shards: int, num_new: int) -> bytes | None:
        """What to note with a commit after which so many shards are in the index; None when nothing is new."""
        self._num_items += num_new
        if isinstance(self._source, _File):
            return None
        self.first, self._is_noted = max(self.first, num_shards), True
        line = json.dumps(self._facts(self.first)).encode()
        return b"".join(one + b"\n" for one in [*(self._others or [b"{}"]), line])

    @property
    def notes_at_end(self) -> bytes | None:
        """The notes without that line; None when there is none."""
        return b"".join(one + b"\n" for one in self._others if one != b"{}") if self._is_noted else None


def _state(path: Path) -> tuple[object, ...]:
    """What differs once a file, or one of the files of a folder, was written again."""
    found = list[object]()
    for one in embedding_files(path) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # who reads it says so
            facts = one.stat()
            found += [one.name, facts.st_ino, facts.st_size, facts.st_mtime_ns]
    return tuple(found)


def _of_unit_length(features: Block, path: object) -> tuple[FloatArray, int]:
    """The vectors (B, D), so that scores are cosines, and how many were scaled; others keep every bit.

    Raises DataError for one that is 0.
    """
    vectors_BD = features.vectors
    length_B = norms(vectors_BD)
    if not length_B.all():
        number = int(np.flatnonzero(length_B == 0)[0])
        raise DataError(f"image_id {features.ids[number]!r}: its features are all 0, which have no direction", at=path)
    is_other_B = np.abs(length_B - 1) > UNIT_LENGTH_TOLERANCE
    if is_other_B.any():
        vectors_BD = vectors_BD.copy()
        vectors_BD[is_other_B] /= length_B[is_other_B, None].astype(np.float32)
    return vectors_BD, int(is_other_B.sum())


def _model_of_features(options: SourceOptions, job: Job, model: Model, embed_dim: int) -> ModelInfo:
    """The model that is named, else an unknown one: then the index can be searched by id, not by text or picture."""
    if model.facts is not None:
        if model.facts.model.fingerprint and options.model is None:
            raise ConfigError(
                f"the file does not record its model; the vectors of {job.address} are of "
                f"{model.facts.model.name}: if these are too, give --model {model.facts.model.name}",
                at=job.source,
            )
        return model.info()
    if options.model is None:
        return ModelInfo("", "", embed_dim)
    info = model.info()
    if info.embed_dim != embed_dim:
        raise DataError(f"vectors of {embed_dim} numbers, the model {info.name} gives {info.embed_dim}", at=job.source)
    return info


def _is_same(item: NewItem, stored: NewItem) -> bool:
    is_same_vector = bool(np.array_equal(item.vector_D.astype(stored.vector_D.dtype), stored.vector_D))
    return is_same_vector and dict(item.metadata) == dict(stored.metadata) and item.thumbnail in (b"", stored.thumbnail)
