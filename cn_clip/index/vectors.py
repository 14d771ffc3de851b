"""Brings vectors that were computed before, a feature file, into an index; what pictures are is for `ingest`."""

# N rows, B rows of a block, D embedding

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cn_clip.command import Speaker
from cn_clip.errors import ConfigError, DataError
from cn_clip.features.files import feature_blocks
from cn_clip.features.rows import Features, check_unique
from cn_clip.index.deciding import parted
from cn_clip.index.ingest import Summary
from cn_clip.index.jobs import Job, Model, changing, finish
from cn_clip.index.options import SourceOptions
from cn_clip.index.progress import Progress
from cn_clip.index.sources import OWN_FIELDS, Table, refuse_excludes, row_of
from cn_clip.index.telling import say_summary
from cn_clip.language import both, counted
from cn_clip.retrieval.ids import HashArray, coming_twice, hashes_of
from cn_clip.retrieval.manifest import ModelInfo
from cn_clip.retrieval.scanning import norms
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.writer import NewItem

# Of features that were rounded to 16 bits.
UNIT_LENGTH_TOLERANCE = 1e-3
VECTORS_A_COMMIT = 65536
# Vectors of so many bytes are kept from the first reading for the second.
_LARGEST_KEPT = 1 << 28


def add_features(options: SourceOptions, job: Job, model: Model, table: Table | None, say: Speaker) -> None:
    """Adds the rows of the job's feature file; raises CnClipError, with all kept that was reported done.

    A faulty file changes nothing: it is read twice, first to see that it is right. Memory: a commit, and 8 bytes a row.
    """
    refuse_excludes(job.source, options.exclude)
    if options.min_size:
        raise ConfigError(f"--min-size {options.min_size}: is for pictures; leave it out", at=job.source)
    file = _File.examined(job.source, job.id_prefix)
    name = str(job.source.absolute())
    info = _model_of_features(options, job, model, file.embed_dim)
    summary, progress = Summary(), Progress(say)
    with changing(job, info, file.embed_dim, name, file) as writer:
        before = writer.manifest.source
        if file.num_scaled:
            say.note(
                both(
                    f"{job.source}: {file.num_scaled} 行的长度不是 1，已归一化",
                    f"{job.source}: normalised {counted(file.num_scaled, 'row')} whose length was not 1",
                )
            )
        with progress.over(len(file), done=0):
            for ids, vectors_BD in file.commits(options.commit_every or VECTORS_A_COMMIT):
                items = []
                stored = writer.stored(ids)
                for item_id, vector_D in zip(ids, vectors_BD, strict=True):
                    had = stored.get(item_id)
                    kept = parted(had.metadata if had else {})[1]
                    row = row_of(table, item_id, job.id_prefix) if table is not None else kept
                    # Without what only pictures have: vectors of a file are not those of the bytes of a digest.
                    metadata = {field: value for field, value in (row or {}).items() if field not in OWN_FIELDS}
                    item = NewItem(item_id, vector_D, {**metadata, "source": name})
                    if had is not None and _is_same(item, had):
                        summary.unchanged += 1
                    else:
                        items.append(item)
                writer.commit(items)
                summary.added += len(items)
                progress.advance(len(ids))
                progress.saved(summary.num_done, summary.added)
        # All rows of the file are items by now: if there are no more items, none is to be removed.
        if job.is_sync and not job.keep_missing and len(writer) > len(file):
            summary.removed = [
                one for one, metadata in writer.items() if one not in file and metadata.get("source") in (name, before)
            ]
            writer.commit(remove=summary.removed)
        finish(writer, job, name)
    say_summary(summary, writer, job, say)


@dataclass(frozen=True)
class _File:
    """A feature file that was read once: whether it has an id, and its rows in order; the ids with their prefix.

    kept: the rows, if they are few enough; the hashes of the ids rise. state: of the files when they were first read.
    """

    path: Path
    id_prefix: str
    embed_dim: int
    num_scaled: int
    hashes_N: HashArray
    kept: list[Features] | None
    state: list[tuple[object, ...]]

    @classmethod
    def examined(cls, path: Path, id_prefix: str) -> "_File":
        """Raises DataError for what `commits` could not give."""
        hashes, widths, num_scaled, num_bytes = [], set[int](), 0, 0
        kept: list[Features] | None = []
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

    def __len__(self) -> int:
        return len(self.hashes_N)

    def __contains__(self, item_id: object) -> bool:
        if type(item_id) not in (int, str):
            return False
        (one,) = hashes_of([item_id])  # type: ignore[list-item]
        place = int(np.searchsorted(self.hashes_N, one))
        return place < len(self) and bool(self.hashes_N[place] == one)

    def _blocks(self) -> Iterator[Features]:
        if self.kept is not None:
            yield from self.kept
            return
        self._check_unchanged()
        yield from feature_blocks(self.path, "image_id")
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if _state(self.path) != self.state:
            raise DataError(
                "changed while it was read, and what was added may be of both; let it be written to its end, and run "
                "the same command again",
                at=self.path,
            )

    def commits(self, size: int) -> Iterator[tuple[list[ItemId], FloatArray]]:
        """(ids, vectors of length 1) of so many rows each; raises DataError for a file that changed meanwhile."""
        ids: list[ItemId] = []
        parts: list[FloatArray] = []
        for block in self._blocks():
            vectors_BD = _of_unit_length(block, self.path)[0]
            for start in range(0, len(block.ids), size):
                ids += [f"{self.id_prefix}{one}" if self.id_prefix else one for one in block.ids[start : start + size]]
                parts.append(vectors_BD[start : start + size])
                while len(ids) >= size:
                    whole_BD = np.concatenate(parts)
                    yield ids[:size], whole_BD[:size]
                    ids, parts = ids[size:], [whole_BD[size:]]
        if ids:
            yield ids, np.concatenate(parts)


def _state(path: Path) -> list[tuple[object, ...]]:
    """Of a file, or of those of a folder: what differs once it was written again."""
    found: list[tuple[object, ...]] = []
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # who reads it says so
            facts = one.stat()
            found.append((one.name, facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return found


def _of_unit_length(features: Features, path: Path) -> tuple[FloatArray, int]:
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
    return is_same_vector and dict(item.metadata) == dict(stored.metadata)
