"""Brings vectors that were computed before, a feature file, into an index; what pictures are is for `ingest`."""

# N rows, D embedding

from pathlib import Path

import numpy as np

from cn_clip.command import Speaker
from cn_clip.errors import ConfigError, DataError
from cn_clip.features.files import read_features
from cn_clip.features.rows import Features
from cn_clip.index.deciding import parted
from cn_clip.index.ingest import Summary
from cn_clip.index.jobs import Job, Model, changing, finish
from cn_clip.index.options import SourceOptions
from cn_clip.index.progress import Progress
from cn_clip.index.sources import OWN_FIELDS, Table, refuse_excludes, row_of
from cn_clip.index.telling import say_summary
from cn_clip.language import both, counted
from cn_clip.retrieval.manifest import ModelInfo
from cn_clip.retrieval.segments import FloatArray
from cn_clip.retrieval.writer import NewItem

# Of features that were rounded to 16 bits.
UNIT_LENGTH_TOLERANCE = 1e-3


def add_features(options: SourceOptions, job: Job, model: Model, table: Table | None, say: Speaker) -> None:
    """Adds the rows of the job's feature file; raises CnClipError, with all kept that was reported done."""
    refuse_excludes(job.source, options.exclude)
    if options.min_size:
        raise ConfigError(f"--min-size {options.min_size}: is for pictures; leave it out", at=job.source)
    features = read_features(job.source, "image_id")
    vectors_ND, num_scaled = _of_unit_length(features, job.source)
    name, embed_dim = str(job.source.absolute()), vectors_ND.shape[1]
    info = _model_of_features(options, job, model, embed_dim)
    ids = [f"{job.id_prefix}{one}" if job.id_prefix else one for one in features.ids]
    summary, progress = Summary(), Progress(say)
    with changing(job, info, embed_dim, name, ids) as writer:
        before, known = writer.manifest.source, dict(writer.items())
        if num_scaled:
            say.note(
                both(
                    f"{job.source}: {num_scaled} 行的长度不是 1，已归一化",
                    f"{job.source}: normalised {counted(num_scaled, 'row')} whose length was not 1",
                )
            )
        with progress.over(len(ids), done=0):
            for start in range(0, len(ids), options.commit_every):
                items = []
                end = start + options.commit_every
                stored = writer.stored(ids[start:end])
                for item_id, vector_D in zip(ids[start:end], vectors_ND[start:end], strict=True):
                    kept = parted(known.get(item_id, {}))[1]
                    row = row_of(table, item_id, job.id_prefix) if table is not None else kept
                    # Without what only pictures have: vectors of a file are not those of the bytes of a digest.
                    metadata = {field: value for field, value in (row or {}).items() if field not in OWN_FIELDS}
                    item = NewItem(item_id, vector_D, {**metadata, "source": name})
                    if item_id in stored and _is_same(item, stored[item_id]):
                        summary.unchanged += 1
                    else:
                        items.append(item)
                writer.commit(items)
                summary.added += len(items)
                progress.advance(len(ids[start:end]))
                progress.saved(summary.num_done, summary.added)
        if job.is_sync and not job.keep_missing:
            wanted = set(ids)
            summary.removed = [
                one
                for one, metadata in writer.items()
                if one not in wanted and metadata.get("source") in (name, before)
            ]
            writer.commit(remove=summary.removed)
        finish(writer, job, name)
    say_summary(summary, writer, job, say)


def _of_unit_length(features: Features, path: Path) -> tuple[FloatArray, int]:
    """The vectors (N, D), so that scores are cosines, and how many were scaled; others keep every bit.

    Raises DataError for one that is 0.
    """
    vectors_ND = features.vectors
    length_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    if not length_N.all():
        number = int(np.flatnonzero(length_N == 0)[0])
        raise DataError(f"image_id {features.ids[number]!r}: its features are all 0, which have no direction", at=path)
    is_other_N = np.abs(length_N - 1) > UNIT_LENGTH_TOLERANCE
    if is_other_N.any():
        vectors_ND = vectors_ND.copy()
        vectors_ND[is_other_N] /= length_N[is_other_N, None].astype(np.float32)
    return vectors_ND, int(is_other_N.sum())


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
