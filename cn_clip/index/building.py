"""What `index build` and `index add` share: from a source to a summary of what was done."""

# N rows, D embedding

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cn_clip.clip.choice import DEFAULT_MODEL
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.opening import full_name
from cn_clip.command import Speaker
from cn_clip.errors import ConfigError, DataError
from cn_clip.features.files import read_features
from cn_clip.features.rows import Features
from cn_clip.index.ingest import Ingest, Settings, Summary, parted
from cn_clip.index.options import AddOptions
from cn_clip.index.progress import Progress
from cn_clip.index.searching import NEW_PICTURES, open_encoder, seen_as
from cn_clip.index.sources import (
    OWN_FIELDS,
    Table,
    is_feature_file,
    is_single_picture,
    open_source,
    read_table,
    row_of,
)
from cn_clip.retrieval import addresses
from cn_clip.retrieval.addresses import Facts, IndexAddress, Writer
from cn_clip.retrieval.manifest import EngineName, Manifest, ModelInfo, PictureFacts, VectorType
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.store import same_model
from cn_clip.retrieval.writer import NewItem
from cn_clip.terminal import shown

LISTED = 20
# Of features that were rounded to 16 bits.
UNIT_LENGTH_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Job:
    """A source to bring into an index. index: its address; engine, vector_type: None keeps what the index has.

    is_sync: the index is to hold what the source holds, and of this source nothing else. replace_source: also when that
    is another source than the last one.
    """

    index: str
    source: Path
    engine: EngineName | None = None
    vector_type: VectorType | None = None
    id_prefix: str = ""
    is_sync: bool = False
    keep_missing: bool = False
    replace_source: bool = False

    @property
    def address(self) -> IndexAddress:
        """Raises ConfigError for a faulty address."""
        return addresses.address_of(self.index)


class Model:
    """The model of an index, opened when it is first needed, and then compared with the index."""

    def __init__(self, options: AddOptions, index: IndexAddress, say: Speaker) -> None:
        self.options, self.index, self.say = options, index, say
        self._opened: tuple[Encoder, ModelInfo] | None = None
        self.facts: Facts | None = addresses.facts(index)
        if self.facts and options.decode not in (None, self.pictures.decode):
            raise ConfigError(
                f"--decode {options.decode}: the vectors are of pictures decoded with {self.pictures.decode}, and "
                "those of both would differ; leave --decode out",
                at=index,
            )
        if self.facts and options.model and full_name(options.model) != self.facts.model.name:
            self.encoder()

    @property
    def name(self) -> str:
        """Of the model that is given, else of that of the index."""
        return self.options.model or (self.facts.model.name if self.facts else "") or DEFAULT_MODEL

    def encoder(self) -> Encoder:
        """Raises ConfigError naming both models when it is not that of the index."""
        if self._opened is None:
            chosen = seen_as(replace(self.options.chosen, model=self.name), self.pictures)
            self._opened = open_encoder(chosen, self.say, kinds=["image"])
            if self.facts:
                same_model(self.facts.model, self._opened[1], self.index)
        return self._opened[0]

    @property
    def pictures(self) -> PictureFacts:
        """How the pictures of the index are seen, or those of a new one are to be."""
        if self.facts is None:
            return replace(NEW_PICTURES, decode=self.options.decode or NEW_PICTURES.decode)
        return self.facts.pictures or PictureFacts()

    def info(self) -> ModelInfo:
        """What the index says, or is to say, of it."""
        if self.facts is None:
            self.encoder()
            assert self._opened is not None
            return self._opened[1]
        return self.facts.model


def update(options: AddOptions, job: Job, say: Speaker) -> None:
    """Does the job, and says what came of it; raises CnClipError, with all kept that was reported done."""
    if not job.is_sync:
        addresses.require(job.address)
    table = read_table(Path(options.metadata), options.image_column) if options.metadata else None
    model = Model(options, job.address, say)
    if is_feature_file(job.source):
        _add_features(options, job, model, table, say)
        return
    source = open_source(job.source, id_prefix=job.id_prefix)
    if job.is_sync and is_single_picture(job.source):
        raise ConfigError("expected a folder; one picture goes into an index with: cn-clip index add", at=job.source)
    if not source.candidates and model.facts is None:
        reason = f"; {shown(source.skipped[0].id)}: {source.skipped[0].reason}" if source.skipped else ""
        raise DataError(f"holds no picture{reason}", at=job.source)
    is_new = model.facts is None
    if is_new:  # its model takes a while to open
        _say_first(options, model, job, say, found=len(source.candidates))
    info, ids = model.info(), [one.id for one in source.candidates]
    with _changing(job, info, info.embed_dim, source.name, ids, model.pictures) as writer:
        before = writer.manifest.source
        settings = Settings(options.batch_size, options.num_workers, options.commit_every, options.thumbnail_size)
        ingest = Ingest(writer, model.encoder, settings, Progress(say), skipped=source.skipped)
        pending = ingest.decide(source.candidates, table, job.id_prefix)
        if not is_new:
            _say_first(options, model, job, say, found=len(ids), unchanged=ingest.summary.unchanged)
        ingest.add(pending)
        if job.is_sync and not job.keep_missing and ingest.summary.signal is None:
            ingest.prune({source.name, before}, source.candidates)
    pictures = {str(one).removeprefix(source.id_prefix) for one in ids}
    unmatched = sum(str(key) not in pictures for key in table or ())
    _say_summary(ingest.summary, writer, job, unmatched, say)
    if ingest.summary.signal is not None:
        print(
            f"已中断，完成的都已保存；再运行同一条命令就接着做 / interrupted, with all kept that was done; the same "
            f"command goes on: {job.address}, {len(writer)} items",
            file=sys.stderr,
        )
        raise SystemExit(128 + ingest.summary.signal)


def _say_first(options: AddOptions, model: Model, job: Job, say: Speaker, *, found: int, unchanged: int = 0) -> None:
    """What there is to do, before anything that takes long."""
    chosen = options.chosen
    say(
        f"找到 {found} 张图片，{unchanged} 张未变 / found {found} pictures, {unchanged} unchanged; 模型 / model "
        f"{shown(model.name)} ({chosen.backend}, {chosen.device}, {chosen.precision}) → {job.address}"
    )


def _add_features(options: AddOptions, job: Job, model: Model, table: Table | None, say: Speaker) -> None:
    features = read_features(job.source, "image_id")
    vectors_ND, num_scaled = _of_unit_length(features, job.source)
    name, embed_dim = str(job.source.absolute()), vectors_ND.shape[1]
    info = _model_of_features(options, job, model, embed_dim)
    ids = [f"{job.id_prefix}{one}" if job.id_prefix else one for one in features.ids]
    summary, progress = Summary(), Progress(say)
    with _changing(job, info, embed_dim, name, ids, PictureFacts()) as writer:
        before, known = writer.manifest.source, dict(writer.items())
        if num_scaled:
            say.note(
                f"{job.source}: {num_scaled} 行的长度不是 1，已归一化 / "
                f"rows whose length is not 1, normalised: {num_scaled}"
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
    _say_summary(summary, writer, job, 0, say)


@contextlib.contextmanager
def _changing(
    job: Job, model: ModelInfo, embed_dim: int, name: str, ids: Sequence[ItemId], pictures: PictureFacts
) -> Iterator[Writer]:
    """The index, new or as it is, opened for changing it; at the end it notes its source and brings up its graph.

    embed_dim: of the vectors to be added; name, ids: of their source; pictures: of a new index. Raises ConfigError for
    another model, and if items of other sources are in the way, DataError for vectors of another length.
    """
    engine, vector_type = job.engine or "exact", job.vector_type or "float32"
    create = Manifest(model, engine=engine, vector_type=vector_type, source=name, pictures=pictures)
    with addresses.open_writer(job.address, create) as writer:
        found = writer.manifest
        if job.vector_type not in (None, found.vector_type):
            raise ConfigError(f"holds {found.vector_type} vectors; build another index for others", at=job.address)
        if found.model.fingerprint != model.fingerprint:
            same_model(found.model, model, job.address)
        if found.model.embed_dim != embed_dim:
            raise DataError(
                f"vectors of {embed_dim} numbers, the index {job.address} has those of "
                f"{found.model.name or 'a model'} of {found.model.embed_dim}",
                at=job.source,
            )
        wanted, before = set(ids), found.source
        if not job.is_sync:
            for item_id, metadata in writer.items():
                if item_id in wanted and metadata.get("source") != name:
                    raise ConfigError(
                        f"has an item {shown(item_id)} of {shown(metadata.get('source', 'elsewhere'))}; "
                        "give --id-prefix, which goes before the ids of what is added",
                        at=job.address,
                    )
        elif not (job.keep_missing or job.replace_source or before in ("", name)):
            old = {item_id for item_id, metadata in writer.items() if metadata.get("source") == before}
            num_gone = len(old - wanted)
            if 2 * num_gone > len(old):  # a folder that moved holds most of what it held; another would empty the index
                raise ConfigError(
                    f"was built from {before}, and {num_gone} of its {len(old)} items are not in {name}; "
                    "to have both, use cn-clip index add; to have the new ones alone, give --replace-source; for a "
                    "second index, give another --output",
                    at=job.address,
                )
        yield writer
        writer.describe(engine=job.engine, source=name if job.is_sync else writer.manifest.source)
        writer.finish()


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


def _model_of_features(options: AddOptions, job: Job, model: Model, embed_dim: int) -> ModelInfo:
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


def _say_summary(summary: Summary, writer: Writer, job: Job, unmatched: int, say: Speaker) -> None:
    """unmatched: rows of the table that name no picture of the source."""
    for title, ids in (
        ("已移除 / removed", [shown(one) for one in summary.removed]),
        ("内容重复 / duplicates", [f"{shown(one)} = {shown(other)}" for one, other in summary.duplicates]),
        ("未收录 / not indexed", [f"{shown(one.id)}: {shown(one.reason)}" for one in summary.skipped]),
    ):
        for line in listed(title, ids):
            say(line)
    if unmatched:
        say(f"表中有 {unmatched} 行没有对应图片 / rows of the table that name no picture: {unmatched}")
    new = f"新编码 / encoded {summary.encoded}, 复用 / reused {summary.reused}"
    if is_feature_file(job.source):
        new = f"新收录 / added {summary.added}"
    say(
        f"{new}, 未变 / unchanged {summary.unchanged}, "
        f"移除 / removed {len(summary.removed)}, 未收录 / not indexed {len(summary.skipped)}"
    )
    say(f"{job.address}: {len(writer)} items ({writer.manifest.engine}), {writer.manifest.model.name or '?'}")
    say.result(
        {
            "index": str(job.address),
            "num_items": len(writer),
            "encoded": summary.encoded,
            "added": summary.added,
            "reused": summary.reused,
            "unchanged": summary.unchanged,
            "removed": summary.removed,
            "duplicates": [{"id": one, "same_as": other} for one, other in summary.duplicates],
            "skipped": [one.as_dict() for one in summary.skipped],
            "unmatched_rows": unmatched,
            "interrupted": summary.signal is not None,
        }
    )


def listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The lines under their title, at most LISTED of them."""
    if lines:
        yield f"{title} ({len(lines)}):"
        yield from (f"  {line}" for line in lines[:LISTED])
    if len(lines) > LISTED:
        yield f"  … 其余 {len(lines) - LISTED} 项用 --json 查看 / {len(lines) - LISTED} more, see --json"
