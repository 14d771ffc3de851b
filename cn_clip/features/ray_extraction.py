"""Extraction by processes of a Ray cluster: `cn-clip features --engine ray --output FOLDER …`.

The driver lists the inputs, cuts them into shards and hands these to workers, one at a time each; a worker writes its
shard itself. Ray Data is not used: its writers choose file names and rows by themselves, so that nobody could tell,
shard by shard, what was finished when the driver was killed. `ray_pool` keeps the processes.
"""

# N inputs of a shard, D embedding

import functools
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cn_clip import __version__
from cn_clip.clip.backends.base import AnyPixels, named
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families.opening import full_name
from cn_clip.clip.opening import open_encoder, precision_of
from cn_clip.clip.pictures import decoded_batches, decoding_threads
from cn_clip.command import Speaker, stdout_to_stderr
from cn_clip.data.bulk_pictures import RESERVED, Part, open_collection
from cn_clip.data.metadata import Table, read_table, row_of
from cn_clip.data.pictures import load_pixels
from cn_clip.data.records import RecordId, digest_of, read_texts
from cn_clip.data.storage import Storage, StorageError, open_storage, shown
from cn_clip.errors import CnClipError, DataError
from cn_clip.features.options import EngineSettings
from cn_clip.features.ray_pool import (
    Actors,
    Pool,
    Worker,
    address_of,
    cluster,
    is_in_ray,
    plan_actors,
    require_ray,
    started,
)
from cn_clip.features.ray_weights import Weights, described, placed, served
from cn_clip.features.rows import FloatArray, IdField
from cn_clip.features.shard_stats import Meters, Rates, ShardStats, Stopwatch
from cn_clip.features.store import (
    SHARD_PREFIX,
    Finished,
    Manifest,
    Shard,
    Skipped,
    begin_shards,
    confirm_shards,
    write_shard,
)
from cn_clip.features.tables import PATH_COLUMN, THUMBNAIL_COLUMN, require_parquet
from cn_clip.language import both, counted, translated
from cn_clip.progress import progress
from cn_clip.stopping import StopRequest

_SHOWN = 20
_FIELDS: dict[Kind, IdField] = {"image": "image_id", "text": "text_id"}
_FOLDERS: dict[Kind, str] = {"image": "images", "text": "texts"}


# --- what is computed


class TextPart(NamedTuple):
    """Some texts of a split."""

    texts: Sequence[tuple[RecordId, str]]


@dataclass(frozen=True)
class ShardJob:
    """Where the features of one kind go, and what they are of."""

    kind: Kind
    folder: Storage
    manifest: Manifest


@dataclass(frozen=True)
class Task:
    """A shard of a job, and its inputs."""

    job: ShardJob
    shard: Shard
    inputs: Part | TextPart
    # What a table says of the pictures, by their ids as texts.
    said: Table = field(default_factory=dict)


class _Inputs(NamedTuple):
    """The inputs of one kind: the facts by which they differ from others, how many, and those of a shard."""

    facts: Mapping[str, object]
    number: int
    part: Callable[[Shard], Any]
    said: Table | None = None


class _Progress:
    """The shards of one job: those that are there, and those to do."""

    def __init__(self, job: ShardJob, inputs: _Inputs, finished: Mapping[int, Finished]) -> None:
        self.job, self.inputs, self.finished = job, inputs, dict(finished)
        self.failed: list[tuple[Shard, str]] = []

    def todo(self) -> list[Shard]:
        return [shard for shard in self.job.manifest.shards() if shard.number not in self.finished]

    @property
    def num_done(self) -> int:
        return sum(one.num_rows + len(one.skipped) for one in self.finished.values())


_Todo: TypeAlias = tuple[_Progress, Shard]


def extract(options: EngineSettings, say: Speaker) -> None:
    """Extracts what is asked for into shards, passing over those that are finished.

    Raises CnClipError naming what cannot be read, a folder of another job, a cluster that is not there, or a shard that
    ended its process time and again; MissingExtraError without ray or pyarrow.
    """
    ray = require_ray()
    require_parquet()
    inputs: dict[Kind, _Inputs] = {}
    if options.extract_text_feats:
        texts = read_texts(options.text_data)
        facts = {"digest": digest_of(texts), "location": options.text_data}
        inputs["text"] = _Inputs(facts, len(texts), lambda shard: TextPart(texts[shard.start : shard.stop]))
    if options.extract_image_feats:
        inputs["image"] = _pictures(options)
    weights = described(options.chosen, options.weights_from)
    output = open_storage(options.output or "")
    with output.alone("another process is extracting into this folder", waiting=say.note) as confirm:
        works = [_begin(options, output, kind, one, weights.digest, say) for kind, one in inputs.items()]
        tasks = deque((work, shard) for work in works for shard in work.todo())
        if tasks:
            # Ray tells on standard output of machines that are gone.
            with stdout_to_stderr(when=options.json), cluster(ray, options.ray_address):
                _run(ray, options, weights, tasks, works, say)
        confirm()
        result: dict[str, object] = {}
        for work in works:
            _look_again(work)
            result |= _end(work, say)
        failed = [(_named((work, shard)), reason) for work in works for shard, reason in work.failed]
        if options.max_failed_shards:
            result["failed_shards"] = [{"shard": name, "reason": reason} for name, reason in failed]
        if not failed:
            say("Done!")
        say.result(result)
        if failed:
            raise CnClipError(
                f"{counted(len(failed), 'shard')} failed ({', '.join(name for name, _ in failed[:_SHOWN])}); run the "
                "same command again to make them"
            )


def _pictures(options: EngineSettings) -> _Inputs:
    pictures = open_collection(options.image_data, options.columns)
    table = None
    if options.metadata:
        table = read_table(Path(options.metadata), options.image_column, own=RESERVED)
    beside = [options.columns, options.thumbnail_size, None if table is None else digest_of(table.items())]
    # As it was before there was anything beside the features: runs of before go on.
    digest = digest_of([pictures.digest, *beside]) if any(beside) else pictures.digest
    facts: dict[str, object] = {"digest": digest, "location": shown(options.image_data)}
    if options.columns:
        facts["columns"] = list(options.columns)
    if options.metadata:
        facts["metadata"] = options.metadata
    if options.thumbnail_size:
        facts["thumbnail_size"] = options.thumbnail_size
    return _Inputs(facts, len(pictures.ids), lambda shard: pictures.part(shard.start, shard.stop), table)


def _begin(
    options: EngineSettings, output: Storage, kind: Kind, inputs: _Inputs, weights: str, say: Speaker
) -> _Progress:
    folder = output.child(_FOLDERS[kind])
    model = model_facts(options, kind, weights)
    manifest = Manifest(_FIELDS[kind], model, inputs.facts, inputs.number, options.shard_size)
    finished = begin_shards(folder, manifest, overwrite=options.overwrite)
    if options.on_error == "stop":  # what an earlier run skipped stops this one
        finished = {number: one for number, one in finished.items() if not one.skipped}
    if finished:
        total = len(manifest.shards())
        done = f"{len(finished)}/{total}"
        say.note(
            both(
                f"{folder.name}: {done} 个分片已完成，跳过",
                f"{folder.name}: {done} shards are finished already; skipping them",
            )
        )
    return _Progress(ShardJob(kind, folder, manifest), inputs, finished)


def _look_again(work: _Progress) -> None:
    """Raises CnClipError unless what is in the folder now is what this run, and those before it, have finished.

    A worker of a run that was stopped for long, or lost its driver, may have written over it meanwhile.
    """
    job = work.job
    there = confirm_shards(job.folder, job.manifest)
    done = [shard for shard in job.manifest.shards() if shard.number in work.finished]
    lost = [shard.name for shard in done if there.get(shard.number) != work.finished[shard.number]]
    if lost:
        raise DataError(
            f"{counted(len(lost), 'shard')} of this run were written over or removed by another process ({lost[0]}); "
            "run the same command again, it makes them anew",
            at=job.folder.name,
        )


def _end(work: _Progress, say: Speaker) -> dict[str, object]:
    """Prints what was made of one kind, and which pictures were skipped; returns it for programs."""
    kind, folder = work.job.kind, work.job.folder
    folder.delete_leftovers(SHARD_PREFIX)
    skipped = [one for number in sorted(work.finished) for one in work.finished[number].skipped]
    num_rows = work.num_done - len(skipped)
    num_failed = sum(shard.stop - shard.start for shard, _ in work.failed)
    assert work.num_done + num_failed == work.inputs.number, "every input is in one shard"
    for one in skipped[:_SHOWN]:
        say.note(both(f"跳过：{translated(one.reason)}", f"skipped: {one.reason}"))
    if skipped:
        say.note(both(f"共跳过 {len(skipped)} 张图片", f"skipped {counted(len(skipped), 'picture')} in all"))
    say(f"{num_rows} {kind} features are stored in {folder.name}")
    result = {f"num_{kind}s": num_rows, f"{kind}_features": folder.name, f"num_{kind}_shards": len(work.finished)}
    if kind == "text":
        return result
    reasons = [{"id": one.id, "reason": one.reason} for one in skipped]
    return {**result, "num_skipped": len(skipped), "skipped": reasons}


# --- on the cluster


def _run(
    ray: Any,
    options: EngineSettings,
    weights: Weights,
    tasks: "deque[_Todo]",
    works: Sequence[_Progress],
    say: Speaker,
) -> None:
    """Works off the tasks; those that failed are left to their `_Progress`.

    Raises CnClipError, and SystemExit after SIGTERM or Ctrl-C.
    """
    pool = Pool(
        ray,
        _Crew(ray, options, [work.job.kind for work in works], served(ray, options.chosen, weights)),
        functools.partial(
            plan_actors,
            num_actors=options.num_actors,
            cpus_per_actor=options.cpus_per_actor,
            gpus_per_actor=options.gpus_per_actor,
            device=options.device,
        ),
        say,
        num_actors=options.num_actors,
        max_failed=options.max_failed_shards,
        wait_s=options.ray_wait if address_of(options.ray_address) else 0,
    )
    say(both(f"Ray：{len(tasks)} 个分片要做", f"Ray: {counted(len(tasks), 'shard')} to do"))
    total, done = (
        sum(numbers) for numbers in zip(*((work.inputs.number, work.num_done) for work in works), strict=True)
    )
    stop, rates = StopRequest(), Rates()
    with stop.noted(), progress(total, both("行", "rows"), both("编码", "encoding"), done=done) as bar:
        for (work, shard), finished in stop.until(pool.results(tasks)):
            work.finished[shard.number] = finished
            bar.advance(shard.stop - shard.start)
            if finished.stats is not None:
                _tell_of_less(finished.stats, options, work.job.kind, rates, say)
                rates.add(finished.stats)
                bar.tell(rates.told())
    for line in rates.lines():
        say(line)
    say.add(actors=rates.values())
    for failed in pool.failed:
        work, shard = failed.task
        work.failed.append((shard, failed.reason))
    if stop.number is not None:
        num_finished = sum(len(work.finished) for work in works)
        print(
            both(
                f"已中断，完成的 {num_finished} 个分片都已保存；再运行同一条命令就接着做",
                f"interrupted; {counted(num_finished, 'finished shard')} stay. Run the same command again to go on",
            ),
            file=sys.stderr,
        )
        raise SystemExit(128 + stop.number)


def _tell_of_less(stats: ShardStats, options: EngineSettings, kind: Kind, rates: Rates, say: Speaker) -> None:
    """Tells once of each process that its memory had no room for the batches asked for."""
    asked = options.img_batch_size if kind == "image" else options.text_batch_size
    if stats.batch < asked and not rates.has_less(stats):
        say.note(
            both(
                f"Ray：{stats.host} 进程 {stats.pid} 内存不足，改为每批 {stats.batch} 个（{kind}）",
                f"Ray: {stats.host} process {stats.pid} ran out of memory; it goes on with batches of {stats.batch} "
                f"({kind})",
            )
        )


class _Crew:
    """Workers of an extraction, and shards as their tasks."""

    def __init__(self, ray: Any, options: EngineSettings, kinds: Sequence[Kind], weights: Weights) -> None:
        self._ray, self._options, self._kinds, self._weights = ray, options, kinds, weights

    def hire(self, size: Actors, node: str | None) -> Any:
        options = self._options
        settings = replace(  # as they hold in the workers, which run in other folders
            options,
            model=full_name(options.chosen.model),
            download_root=options.download_root and os.path.abspath(os.path.expanduser(options.download_root)),
            num_threads=options.num_threads or (None if options.backend == "tensorrt" else size.cpus),
            num_workers=decoding_threads(size.cpus) if options.num_workers is None else options.num_workers,
            device="cpu" if options.device == "auto" and not size.gpus else options.device,
        )
        return started(self._ray, ShardWorker, size, node).remote(settings, self._kinds, self._weights)

    def send(self, worker: Any, task: "_Todo") -> Any:
        return worker.work.remote(_task_of(*task))

    def named(self, task: "_Todo") -> str:
        return _named(task)


def _task_of(work: "_Progress", shard: Shard) -> Task:
    """A shard with its inputs, and what a table says of these."""
    part, table = work.inputs.part(shard), work.inputs.said
    said = {} if table is None else {str(one): row for one in part.ids if (row := row_of(table, one)) is not None}
    return Task(work.job, shard, part, said)


def _named(task: "_Todo") -> str:
    """A shard in a message."""
    work, shard = task
    return f"{work.job.folder.child(shard.name).name} (inputs {shard.start} to {shard.stop - 1})"


# --- one worker


class ShardWorker(Worker):
    """Computes and writes one shard after another; holds one encoder, opened with the first task."""

    def __init__(self, options: EngineSettings, kinds: Sequence[Kind], weights: Weights) -> None:
        """weights: those of the machine where the job was planned."""
        self._options, self._kinds, self._weights = options, kinds, weights
        self._encoder: Encoder | None = None
        self._meters: Meters | None = None

    def work(self, task: Task) -> Finished | CnClipError:
        """Computes a shard and writes it; an error that another attempt would meet again is returned, not raised.

        What a disk or a store says is raised: another machine may reach it.
        """
        try:
            if self._encoder is None:
                chosen = placed(self._options.chosen, self._weights)
                self._encoder = open_encoder(chosen, Speaker(quiet=True), kinds=self._kinds)
            finished = self._made(self._encoder, task)
        except CnClipError as error:
            if isinstance(error, (StorageError, OSError)):
                raise
            return error
        if finished.stats is not None and is_in_ray():
            self._meters = self._meters or Meters()
            self._meters.count(task.job.kind, finished.stats)
        return finished

    def _made(self, encoder: Encoder, task: Task) -> Finished:
        job, part, watch = task.job, task.inputs, Stopwatch()
        if isinstance(part, TextPart):
            size = self._options.text_batch_size
            rows_ND = text_rows(encoder, part, batch_size=size)
            ids = [text_id for text_id, _ in part.texts]
            stats = watch.stop(len(ids), min(size, encoder.most_at_once.get("text", size)))
            return write_shard(job.folder, job.manifest, task.shard, ids, rows_ND, stats=stats)
        outcomes, rows_ND = picture_rows(encoder, part, self._options, watch)
        kept = [index for index, one in enumerate(outcomes) if not isinstance(one, Skipped)]
        beside = [{**_beside(part, index, outcomes[index]), **_row(task.said, part.ids[index])} for index in kept]
        size = self._options.img_batch_size
        return write_shard(
            job.folder,
            job.manifest,
            task.shard,
            [part.ids[index] for index in kept],
            rows_ND[kept],
            columns={name: [row.get(name) for row in beside] for name in _names(beside)},
            skipped=[one for one in outcomes if isinstance(one, Skipped)],
            stats=watch.stop(len(kept), min(size, encoder.most_at_once.get("image", size))),
        )


def text_rows(encoder: Encoder, part: TextPart, *, batch_size: int) -> FloatArray:
    """Unit rows (N, D) of the texts of a shard; equal texts are computed once."""
    first_id = {text: text_id for text_id, text in reversed(part.texts)}
    row_of = {text: row for row, text in enumerate(first_id)}
    with named("text_id", lambda row: list(first_id.values())[row]):
        rows_MD = encoder.encode_texts(list(first_id), batch_size=batch_size)
    rows_ND: FloatArray = rows_MD[[row_of[text] for _, text in part.texts]]
    return rows_ND


def _beside(part: Part, index: int, said: Mapping[str, Any] | Skipped) -> dict[str, Any]:
    """What is kept beside the features of a picture, without what a table says."""
    assert not isinstance(said, Skipped), "a picture that is left out has no row"
    path = {} if part.paths is None else {PATH_COLUMN: part.paths[index]}
    return {**path, **said}


def _row(table: Table, image_id: RecordId) -> Mapping[str, Any]:
    return row_of(table, image_id) or {}


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that any of the rows has, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def picture_rows(
    encoder: Encoder, part: Part, options: EngineSettings, watch: Stopwatch
) -> tuple[list[Mapping[str, Any] | Skipped], FloatArray]:
    """(what lies beside it, or why it was skipped; unit row (N, D)) of each picture of a shard.

    The row of a skipped one says nothing. Raises StorageError when the store fails, DataError with --on-error stop for
    a picture that cannot be read.
    """
    transform = encoder.transform

    def load(index: int, out: AnyPixels) -> Mapping[str, Any] | Skipped:
        try:
            stored = part[index]
            small = load_pixels(stored, transform, out, thumbnail_size=options.thumbnail_size)
        except StorageError:  # the store failed, not the picture
            raise
        except DataError as error:
            if options.on_error == "stop":
                raise DataError(f"{error} (--on-error skip leaves such pictures out)") from error
            out[...] = 0
            return Skipped(part.ids[index], str(error))
        return {**stored.beside, THUMBNAIL_COLUMN: small} if small else stored.beside

    outcomes: list[Mapping[str, Any] | Skipped] = []
    rows_ND = np.empty((len(part), encoder.embed_dim), dtype=np.float32)
    batches = decoded_batches(load, range(len(part)), encoder.room, options.img_batch_size, options.num_workers)
    with named("image_id", lambda position: part.ids[len(outcomes) + position]):
        for outcome, rows_BD in encoder.pixel_rows(watch.waited(batches)):
            rows_ND[len(outcomes) : len(outcomes) + len(outcome)] = rows_BD
            outcomes += outcome
    return outcomes, rows_ND


# --- the facts by which models differ, on whichever machine


def model_facts(options: EngineSettings, kind: Kind, weights: str) -> Mapping[str, object]:
    """What decides on the rows, besides the inputs: the model of a `Manifest`.

    Batch sizes and threads are not in it, for they change only the last digits: a run may go on with others.
    """
    facts: dict[str, object] = {
        "weights": weights,
        "backend": options.backend,
        "precision": precision_of(options.chosen),
        "device": options.device,
        "vision_model": options.vision_model,
        "text_model": options.text_model,
        "version": __version__,
    }
    facts |= {"context_length": options.context_length} if kind == "text" else {"decode": options.decode}
    if kind == "image" and options.merge_tokens:
        facts["merge_tokens"] = options.merge_tokens
    if options.strict_fp32:  # only where it is asked for: runs of versions without it go on
        facts["strict_fp32"] = True
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=8).hexdigest()
    return {"digest": digest, "resume": os.path.basename(options.chosen.model), **facts}
