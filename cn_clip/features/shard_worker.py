"""Computes and writes one shard after another; `ray_extraction` runs several of these, on one machine or many."""

# N inputs of a shard, D embedding

import glob
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cn_clip import __version__
from cn_clip.clip import choice
from cn_clip.clip.backends.base import Kind, Pixels, named
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families.names import is_foreign
from cn_clip.clip.families.snapshots import files_of
from cn_clip.clip.pictures import decoded_batches
from cn_clip.command import Speaker
from cn_clip.data.bulk_pictures import Part
from cn_clip.data.pictures import load_picture
from cn_clip.data.records import RecordId
from cn_clip.data.storage import Storage, StorageError
from cn_clip.digests import add_file
from cn_clip.errors import CnClipError, ConfigError, DataError
from cn_clip.features.ray_settings import OnError
from cn_clip.features.rows import FloatArray
from cn_clip.features.shards import Finished, Manifest, Shard, Skipped, write_shard


class Options(choice.ModelOptions, Protocol):
    """The settings that a worker obeys."""

    @property
    def img_batch_size(self) -> int: ...
    @property
    def text_batch_size(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def on_error(self) -> OnError: ...


class TextPart(NamedTuple):
    """Some texts of a split."""

    texts: Sequence[tuple[RecordId, str]]


@dataclass(frozen=True)
class Job:
    """Where the features of one kind go, and what they are of."""

    kind: Kind
    folder: Storage
    manifest: Manifest


@dataclass(frozen=True)
class Task:
    """A shard of a job, and its inputs."""

    job: Job
    shard: Shard
    inputs: Part | TextPart


class ShardWorker:
    """Holds one encoder, opened with the first task."""

    def __init__(self, options: Options, kinds: Sequence[Kind], weights: str) -> None:
        """weights: what `weights_digest` gave where the job was planned."""
        self._options, self._kinds, self._weights = options, kinds, weights
        self._encoder: Encoder | None = None

    def ready(self) -> None:
        """Answers when the worker is there."""

    def work(self, task: Task) -> Finished | CnClipError:
        """Computes a shard and writes it; an error that another attempt would meet again is returned, not raised."""
        try:
            encoder = self._open()
            if isinstance(task.inputs, TextPart):
                return _do_texts(encoder, task, task.inputs, self._options)
            return _do_pictures(encoder, task, task.inputs, self._options)
        except CnClipError as error:
            return error

    def _open(self) -> Encoder:
        if self._encoder is None:
            if weights_digest(self._options) != self._weights:
                raise ConfigError(
                    f"{platform.node()}: {self._options.resume} is another file there than where the run was started; "
                    "copy the same weights to every machine"
                )
            self._encoder = choice.open_encoder(self._options, Speaker(quiet=True), kinds=self._kinds)
        return self._encoder


def _do_texts(encoder: Encoder, task: Task, part: TextPart, options: Options) -> Finished:
    rows_ND = text_rows(encoder, part, batch_size=options.text_batch_size)
    ids = [text_id for text_id, _ in part.texts]
    return write_shard(task.job.folder, task.job.manifest, task.shard, ids, rows_ND)


def text_rows(encoder: Encoder, part: TextPart, *, batch_size: int) -> FloatArray:
    """Unit rows (N, D) of the texts of a shard; equal texts are computed once."""
    first_id = {text: text_id for text_id, text in reversed(part.texts)}
    row_of = {text: row for row, text in enumerate(first_id)}
    with named("text_id", lambda row: list(first_id.values())[row]):
        rows_MD = encoder.encode_texts(list(first_id), batch_size=batch_size)
    rows_ND: FloatArray = rows_MD[[row_of[text] for _, text in part.texts]]
    return rows_ND


def _do_pictures(encoder: Encoder, task: Task, part: Part, options: Options) -> Finished:
    outcomes, rows_ND = _encode(encoder, part, options)
    kept = [index for index, skipped in enumerate(outcomes) if skipped is None]
    return write_shard(
        task.job.folder,
        task.job.manifest,
        task.shard,
        [part.ids[index] for index in kept],
        rows_ND[kept],
        paths=None if part.paths is None else [part.paths[index] for index in kept],
        skipped=[skipped for skipped in outcomes if skipped is not None],
    )


def _encode(encoder: Encoder, part: Part, options: Options) -> tuple[list[Skipped | None], FloatArray]:
    """Why a picture was skipped, or None, and a row, for each picture."""
    transform = encoder.transform

    def load(index: int, out: Pixels) -> Skipped | None:
        try:
            stored = part[index]
            load_picture(
                stored.data, stored.where, lambda image: transform.array(image, out), draft_size=transform.draft_size
            )
        except StorageError:  # the store failed, not the picture
            raise
        except DataError as error:
            if options.on_error == "stop":
                raise DataError(f"{error} (--on-error skip leaves such pictures out)") from error
            out[...] = 0
            return Skipped(part.ids[index], str(error))
        return None

    outcomes: list[Skipped | None] = []
    rows_ND = np.empty((len(part), encoder.embed_dim), dtype=np.float32)
    batches = decoded_batches(load, range(len(part)), transform.resolution, options.img_batch_size, options.num_workers)
    for outcome, pixels in batches:
        ids = part.ids[len(outcomes) : len(outcomes) + len(outcome)]
        with named("image_id", ids.__getitem__):
            rows_ND[len(outcomes) : len(outcomes) + len(outcome)] = encoder.backend.encode_pixels(pixels)
        outcomes += outcome
    return outcomes, rows_ND


# --- what tells models apart, on whichever machine


def weights_digest(options: choice.ModelOptions) -> str:
    """A digest of the bytes of the weights; raises CheckpointError when there are none, DownloadError."""
    digest = hashlib.blake2b(digest_size=8)
    for path in _weight_files(options):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        add_file(digest, path)
    return digest.hexdigest()


def _weight_files(options: choice.ModelOptions) -> list[Path]:
    from cn_clip import zoo
    from cn_clip.clip.weights import hub

    name = options.resume or ""
    if is_foreign(name):
        return files_of(name, download_root=options.download_root)
    given = Path(name)
    if zoo.named(name) is None and not given.exists():
        exported = sorted(given.parent.glob(f"{glob.escape(given.name)}.*"))  # the prefix of exported files
        if exported:
            return [path for path in exported if path.is_file()]
    return hub.files_of(hub.weight_file(name, download_root=options.download_root))


def model_facts(options: choice.ModelOptions, kind: Kind, weights: str) -> Mapping[str, object]:
    """What decides on the rows, besides the inputs: the model of a `Manifest`.

    Batch sizes and threads are not in it, for they change the last digits alone: a run may go on with others.
    """
    facts: dict[str, object] = {
        "weights": weights,
        "backend": options.backend,
        "precision": choice.precision_of(options),
        "device": options.device,
        "vision_model": options.vision_model,
        "text_model": options.text_model,
        "version": __version__,
    }
    facts |= {"context_length": options.context_length} if kind == "text" else {"decode": options.decode}
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=8).hexdigest()
    return {"digest": digest, "resume": os.path.basename(options.resume or ""), **facts}
