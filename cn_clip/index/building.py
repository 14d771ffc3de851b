"""What `index build` and `index add` share: from a source to a summary of what was done."""

from collections.abc import Iterable
from pathlib import Path

from cn_clip.command import Speaker
from cn_clip.data.ocr import Reader
from cn_clip.errors import ConfigError, DataError
from cn_clip.index import skips
from cn_clip.index.clips import Clips
from cn_clip.index.ingest import MOST_ASKED, PICTURES_A_COMMIT, Ingest, Settings, Summary
from cn_clip.index.jobs import Job, Model, changing, finish, job_of
from cn_clip.index.options import SourceOptions
from cn_clip.index.progress import Progress
from cn_clip.index.renewing import Renewal
from cn_clip.index.skips import Skipped
from cn_clip.index.sources import Source, is_feature_file, is_single_picture, open_source, read_table
from cn_clip.index.telling import refuse_interrupted, say_first, say_summary
from cn_clip.index.vectors import add_features
from cn_clip.retrieval import addresses
from cn_clip.terminal import shown

__all__ = ["Job", "job_of", "update"]


def update(options: SourceOptions, job: Job, say: Speaker, *, model: Model | None = None) -> None:
    """Does the job, and says what came of it; raises CnClipError, with all kept that was reported done.

    model: one that is open from an update before.
    """
    if not job.is_sync:
        addresses.require(job.address)
    table = read_table(Path(options.metadata), options.image_column) if options.metadata else None
    model = model or Model(options, job.address, say, renew=job.renew)
    if is_feature_file(job.source):
        add_features(options, job, model, table, say)
        return
    assert isinstance(job.source, Path), "an address is one of features"
    progress = Progress(say)
    source = _opened(options, job, job.source, progress)
    files = [*source.candidates, *source.videos]
    if not files and model.facts is None:
        raise DataError(f"holds no picture{_first(source.skipped)}", at=job.source)
    is_new = model.facts is None
    if is_new:  # its model takes a while to open
        say_first(model, job, say, source=source)
    info, ids = model.info(), [one.id for one in files]
    pictures = model.reading(options)
    reader = Reader() if pictures.ocr else None
    # Pictures that are added to a large index are asked for there; any other run goes through all items.
    few = None if job.is_sync or job.renew or source.videos or len(ids) > MOST_ASKED else ids
    with changing(job, info, info.embed_dim, source.name, set(ids), pictures, few=few) as writer:
        before = writer.manifest.source
        settings = Settings(
            options.batch_size,
            options.num_workers,
            options.commit_every or PICTURES_A_COMMIT,
            options.thumbnail_size,
            options.min_size,
        )
        ingest = Ingest(writer, model.encoder, settings, progress, skipped=source.skipped, reader=reader, few=few)
        if options.retry:
            ingest.failures.forget(source.name)
        moved_from = {source.name, before} if job.is_sync else set[str]()
        clips = Clips(ingest, source.videos, options.video_every, job.id_prefix)
        pending = ingest.decide(source.candidates, table, job.id_prefix, moved_from=moved_from)
        videos = clips.decide(table)
        if not is_new:
            say_first(model, job, say, source=source, unchanged=ingest.summary.unchanged)
        renewal = Renewal(model.recorded, model.pictures) if job.renew and not is_new else None
        if renewal is not None:
            pending = renewal.begin(ingest, pending, job.address)
        ingest.add(pending)
        if ingest.summary.signal is None:
            clips.add(videos)
        if renewal is not None and ingest.summary.signal is None:
            renewal.end(writer)
            say(renewal.told())
        if ingest.summary.signal is None:  # else the next run is to know the source that the items are still of
            if job.is_sync and not job.keep_missing:
                ingest.prune(moved_from, files, with_folders=job.prune or job.replace_source)
            finish(writer, job, source.name, pictures)
    names = {str(one).removeprefix(source.id_prefix) for one in ids}
    unmatched = sum(str(key) not in names for key in table or ())
    say_summary(ingest.summary, writer, job, say, unmatched=unmatched, links=source.links)
    _refuse_end(ingest.summary, job, source, num_items=len(writer))


def _opened(options: SourceOptions, job: Job, path: Path, progress: Progress) -> Source:
    with progress.looking() as seen:
        source = open_source(path, id_prefix=job.id_prefix, exclude=options.exclude, seen=seen)
    if job.is_sync and is_single_picture(path):
        raise ConfigError("expected a folder; one picture goes into an index with: cn-clip index add", at=job.source)
    if options.video_every == 0:
        source.skipped += [Skipped(one.id, "a video, and --video-every is 0", skips.VIDEO) for one in source.videos]
        source.videos.clear()
    return source


def _refuse_end(summary: Summary, job: Job, source: Source, *, num_items: int) -> None:
    """As `refuse_interrupted`; raises DataError when no picture could be indexed."""
    refuse_interrupted(summary, job, num_items=num_items)
    if (source.candidates or source.videos) and not num_items:
        reasons = f"{skips.told(summary.skipped)}{_first(summary.skipped)}"
        raise DataError(f"nothing was indexed: {reasons}", at=job.source)


def _first(skipped: Iterable[Skipped]) -> str:
    """The first failure, else the first of the others."""
    found = [*skips.in_order(skipped), *skipped][:1]
    return "".join(f"; {shown(one.id)}: {shown(one.reason)}" for one in found)
