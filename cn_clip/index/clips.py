"""Videos of a source into an index: some frames of each become items. `building` calls it after the pictures.

A killed run may leave a part of a video's frames. So the first frame comes last, and bears how many there are: without
it, or with another number of frames beside it, a video is read again.
"""

# B batch, D embedding

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cn_clip.clip.backends.base import AnyPixels, named
from cn_clip.clip.transforms import write_pixels
from cn_clip.data.videos import Frame, NoPicturesError, TooLongError, frames
from cn_clip.errors import DataError, MissingExtraError, reason_of
from cn_clip.index import skips
from cn_clip.index.deciding import decide
from cn_clip.index.ingest import Ingest
from cn_clip.index.skips import Skipped
from cn_clip.index.sources import Candidate, Table, file_id
from cn_clip.retrieval.segments import ItemId
from cn_clip.retrieval.writer import NewItem
from cn_clip.stopping import StopRequest

DEFAULT_EVERY = 10.0
# What is alike for all frames of a video but the first, and what the index keeps of it.
_OF_FIRST = "frames"


@dataclass(frozen=True)
class _Shot:
    """A frame whose pixels are ready. thumbnail: made of it already, so that no picture is held."""

    video: Candidate
    id: ItemId
    metadata: dict[str, Any]
    thumbnail: bytes


@dataclass(frozen=True)
class _End:
    """The last frame of a video came before. problem: why there are no more."""

    video: Candidate
    problem: Skipped | None


_Step: TypeAlias = _Shot | _End


@dataclass
class _Open:
    """A video of which frames have come. first: is kept back until all have."""

    first: NewItem | None = None
    ids: list[ItemId] = field(default_factory=list)


class Clips:
    """The videos of one source. every: seconds between frames at most; None: as it was, else `DEFAULT_EVERY`."""

    def __init__(self, run: Ingest, videos: Sequence[Candidate], every: float | None, id_prefix: str) -> None:
        self._run, self._id_prefix = run, id_prefix
        self._known: dict[ItemId, dict[str, Any]] = {}
        self._frames: dict[ItemId, list[ItemId]] = {}
        for item_id, metadata in run.writer.items() if run.few is None else ():
            if metadata.get("kind") == "video":
                self._frames.setdefault(file_id(item_id, metadata), []).append(item_id)
                if _OF_FIRST in metadata:
                    self._known[file_id(item_id, metadata)] = metadata
        for video, ids in self._frames.items():
            if self._known.get(video, {}).get(_OF_FIRST) != len(ids):  # a part of them
                self._known.pop(video, None)
        self._videos = [
            replace(one, metadata={**one.metadata, "video_every": every or self._every(one.id)}) for one in videos
        ]
        self._open: dict[ItemId, _Open] = {}
        self._gone: list[ItemId] = []
        # Those of which only what is known besides has changed.
        self._same: list[Candidate] = []

    def decide(self, table: Table | None) -> list[Candidate]:
        """The videos that are to be read; counts the others, but for those whose frames `add` gives new metadata."""
        run = self._run
        decision = decide(
            self._videos,
            self._known,
            run.failures,
            table=table,
            id_prefix=self._id_prefix,
            min_size=0,
            needed=run.needed,
        )
        run.summary.unchanged += decision.num_unchanged
        for video, skipped in decision.skipped:
            run.refuse(video, skipped)
        pending = []
        for video in decision.pending:
            before = self._known.get(video.id, {})
            same = ("size", "mtime_ns", "video_every")
            is_same = before.keys() >= set(run.needed) and before != {}
            if is_same and all(before.get(name) == video.metadata[name] for name in same):
                self._same.append(video)
            else:
                pending.append(video)
        return pending

    def add(self, pending: Sequence[Candidate]) -> None:
        """Reads, computes and commits; raises as `Ingest.add`, and like it ends at a signal."""
        run, stop, done = self._run, StopRequest(), self._run.summary.num_done
        if not pending and not self._same:
            return
        with stop.noted(), run.progress.over(done + len(self._same) + len(pending), done=done):
            for video in self._same:
                if stop.number is not None:
                    break
                self._renew(video)
                if run.is_commit_due:
                    self._commit()
            steps = self._computed(pending) if pending else iter(())
            for one in stop.until(steps):
                self._take(*one)
                if run.is_commit_due:
                    self._commit()
            self._commit()
        run.summary.signal = stop.number

    def _every(self, video: ItemId) -> float:
        return float(self._known.get(video, {}).get("video_every", DEFAULT_EVERY))

    def _renew(self, video: Candidate) -> None:
        """The frames of a video that is as it was, with what else is known of it now."""
        run = self._run
        for one in run.writer.stored(self._frames[video.id]).values():
            own = {name: one.metadata[name] for name in _OF_FRAME if name in one.metadata}
            run.keep([replace(one, metadata={**own, **video.metadata})])
        run.summary.reused += 1
        run.progress.advance(1)

    def _computed(self, pending: Sequence[Candidate]) -> Iterator[tuple[list[_Step], Any]]:
        """Batches of steps with the vectors (B, D) of the frames among them."""
        encoder, ids, done = self._run.encoder(), list[ItemId](), 0

        def batches() -> Iterator[tuple[list[_Step], AnyPixels]]:
            size = self._run.settings.batch_size
            steps, pixels, count = list[_Step](), encoder.room(size), 0
            for step, frame in self._steps(pending):
                steps.append(step)
                if frame is not None:
                    write_pixels(encoder.transform, frame.image, pixels[count])
                    ids.append(step.id)
                    count += 1
                if count == size:
                    yield steps, pixels
                    steps, pixels, count = [], encoder.room(size), 0
            yield steps, pixels[:count]

        with named("id", lambda position: ids[done + position]):
            for steps, rows_BD in encoder.pixel_rows(batches()):
                done += len(rows_BD)
                yield steps, rows_BD

    def _steps(self, pending: Sequence[Candidate]) -> Iterator[tuple[Any, Frame | None]]:
        run = self._run
        for video in pending:
            problem, count = None, 0
            try:
                for frame in frames(Path(video.metadata["path"]), video.metadata["video_every"]):
                    spelled = f"{frame.seconds:.2f}".rstrip("0").rstrip(".")
                    name = str(video.id).removeprefix(self._id_prefix)
                    own = {"kind": "video", "time": frame.seconds, "video": name}
                    metadata = {**frame.fields, **video.metadata, **own}
                    if run.reader is not None:
                        metadata["text"] = run.reader.read(frame.image)
                    count += 1
                    yield _Shot(video, f"{video.id}#t={spelled}", metadata, run.thumbnail(frame.image)), frame
            except OSError as error:
                reason = f"cannot be read ({reason_of(error)})"
                problem = Skipped(video.id, reason, skips.UNREADABLE, is_gone=False)
            except (DataError, MissingExtraError, ValueError) as error:
                kind = skips.kind_of(error, num_bytes=video.metadata["size"])
                if isinstance(error, (NoPicturesError, TooLongError)):
                    kind = skips.NO_PICTURES if isinstance(error, NoPicturesError) else skips.TOO_LONG
                is_gone = not count and not kind.startswith(skips.WITHOUT)
                problem = Skipped(video.id, str(error), kind, is_gone=is_gone)
            yield _End(video, problem), None

    def _take(self, steps: Sequence[_Step], rows_BD: Any) -> None:
        run, rows = self._run, iter(rows_BD)
        for step in steps:
            opened = self._open.setdefault(step.video.id, _Open())
            if isinstance(step, _Shot):
                item = NewItem(step.id, np.array(next(rows)), step.metadata, step.thumbnail)
                if opened.first is None:
                    opened.first = item
                else:
                    run.keep([item])
                opened.ids.append(step.id)
                continue
            del self._open[step.video.id]
            if step.problem is not None:
                run.refuse(step.video, step.problem)
            # One that could not be read just now is read again: without its first frame it counts as begun.
            is_read = step.problem is None or step.problem.kind != skips.UNREADABLE
            if opened.first is not None and is_read:
                count = len(opened.ids)
                run.keep([replace(opened.first, metadata={**opened.first.metadata, _OF_FIRST: count})])
                run.summary.videos += 1
                run.summary.frames += count
                self._gone += sorted(set(self._frames.get(step.video.id, ())).difference(opened.ids), key=str)
            run.progress.advance(1)

    def _commit(self) -> None:
        self._run.commit()
        self._run.writer.commit(remove=self._gone)
        self._gone.clear()


# What each frame has of its own, and what its video says of itself.
_OF_FRAME = ("kind", "time", "video", _OF_FIRST, "width", "height", "date", "camera", "latitude", "longitude", "text")
