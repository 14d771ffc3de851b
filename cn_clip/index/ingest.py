"""Brings an index up to what a source holds: only what is new is read, only what was never seen is computed."""

# B batch, R resolution, D embedding

import contextlib
import hashlib
import itertools
import posixpath
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from cn_clip.clip.backends.base import AnyPixels, Rows, named
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.orientation import full_size
from cn_clip.clip.pictures import decoded_batches
from cn_clip.clip.thumbnails import thumbnail
from cn_clip.clip.transforms import write_pixels
from cn_clip.data import facts
from cn_clip.data.ocr import LONGEST_SIDE, Reader
from cn_clip.data.pictures import open_picture
from cn_clip.errors import ConfigError, DataError, MissingExtraError, reason_of
from cn_clip.index import skips
from cn_clip.index.deciding import decide, parted
from cn_clip.index.failures import Failures
from cn_clip.index.progress import Progress
from cn_clip.index.pruning import vanished
from cn_clip.index.skips import Skipped
from cn_clip.index.sources import Candidate, Table, file_id
from cn_clip.retrieval.addresses import Writer
from cn_clip.retrieval.conditions import parse_condition
from cn_clip.retrieval.segments import ItemId
from cn_clip.retrieval.writer import NewItem
from cn_clip.stopping import StopRequest

PICTURES_A_COMMIT = 1000
# After so long, what was computed is committed though it is less than --commit-every.
COMMIT_SECONDS = 20.0
# Items that may lend their vectors next, as many as a store on another machine is asked for at once.
MOST_READ_AHEAD = 1000
# Pictures of which an index is asked what it knows, instead of gone through.
MOST_ASKED = 1000
_DIGEST_BYTES = 16
# What an item lends to others of the same bytes, besides its vector and thumbnail.
_OF_BYTES = ("width", "height", "text")


@dataclass(frozen=True)
class Settings:
    """How pictures become items; see the options of the same names. commit_every: None commits only when told to."""

    batch_size: int = 32
    num_workers: int | None = None
    commit_every: int | None = PICTURES_A_COMMIT
    thumbnail_size: int = 512
    min_size: int = 0


@dataclass
class Summary:
    """What was done.

    added: vectors of a feature file. reused: those that were there for the same bytes; duplicates: (id, id of the same
    bytes). renamed: (id, id of what is gone). missing: the items that stay though their folder, the key, is gone.
    videos: those that were read, with so many frames. signal: the number of the one that ended the run before its
    time; what was done until then is kept.
    """

    encoded: int = 0
    added: int = 0
    reused: int = 0
    unchanged: int = 0
    videos: int = 0
    frames: int = 0
    removed: list[ItemId] = field(default_factory=list)
    duplicates: list[tuple[ItemId, ItemId]] = field(default_factory=list)
    renamed: list[tuple[ItemId, ItemId]] = field(default_factory=list)
    missing: dict[str, list[ItemId]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    signal: int | None = None

    @property
    def num_done(self) -> int:
        """Pictures, videos or rows of the source that are in the index."""
        return self.encoded + self.added + self.reused + self.unchanged + self.videos


@dataclass(frozen=True)
class _Prepared:
    """A picture that was read. known: its vector was there when it was read, so that it was not decoded.

    facts: what the picture says of itself; what is known of the candidate goes before it. is_outdated: the vector that
    was there is of the picture as it was seen before.
    """

    candidate: Candidate
    data: bytes
    digest: str
    known: bool
    facts: Mapping[str, Any]
    thumbnail: bytes
    is_outdated: bool = False


@dataclass(frozen=True)
class _Refused:
    """A picture that was read and does not go into the index."""

    candidate: Candidate
    skipped: Skipped


class Ingest:
    """One run over one source. encoder: called when the first picture has to be computed."""

    def __init__(
        self,
        writer: Writer,
        encoder: Callable[[], Encoder],
        settings: Settings,
        progress: Progress,
        *,
        skipped: Iterable[Skipped] = (),
        reader: Reader | None = None,
        few: Collection[ItemId] | None = None,
    ) -> None:
        """few: the ids of all that may be added, where the index is to be asked for these instead of gone through."""
        self.writer, self.encoder, self.settings, self.progress = writer, encoder, settings, progress
        self.summary, self.reader = Summary(skipped=list(skipped)), reader
        self.failures = Failures(writer.notes())
        self.few = few
        self._known = dict(writer.items()) if few is None else writer.known(few)
        # The item that lends its vector to others of the same bytes.
        self._owners: dict[str, ItemId] = {}
        if few is None:
            self._own(self._known)
        # The items that are gone, by their digests.
        self._gone: dict[str, list[ItemId]] = {}
        # Whether a picture of these bytes would get another vector now than it had; see `renewing`.
        self.is_outdated: Callable[[bytes], bool] = lambda data: False
        # The items that are read again, in the order in which they come.
        self._expected = deque[ItemId]()
        self._buffer: dict[ItemId, NewItem] = {}
        # The items among them that a batch needs, and those that it adds.
        self._lenders: dict[ItemId, NewItem] = {}
        self._committed_at = time.monotonic()

    def _own(self, items: Mapping[ItemId, Mapping[str, Any]]) -> None:
        for item_id, metadata in items.items():
            if "digest" in metadata:
                self._owners.setdefault(metadata["digest"], item_id)

    def _ask_owners(self, pending: Sequence[Candidate]) -> None:
        """Of a few pictures, which are read for it: the items of the same bytes."""
        digests = set[str]()
        for one in pending:
            with contextlib.suppress(OSError, DataError, ValueError):  # `read` tells
                digests.add(_digest_of(one.read()))
        if not digests:
            return
        condition = parse_condition("digest=" + ",".join(f'"{one}"' for one in sorted(digests)))
        try:
            same = self.writer.known(self.writer.fitting(condition))
        except ConfigError:  # no item has a digest
            return
        self._known.update(same)
        self._own(same)

    def decide(
        self,
        candidates: Sequence[Candidate],
        table: Table | None = None,
        id_prefix: str = "",
        *,
        moved_from: Collection[str] = (),
    ) -> list[Candidate]:
        """Those that are to be read, see `deciding`; counts the others.

        moved_from: sources whose items may have got other names: a new picture of the same bytes as one that is gone
        takes over its metadata.
        """
        there = {one.id for one in candidates}
        for item_id, metadata in self._known.items():
            if metadata.get("source") in moved_from and item_id not in there and "digest" in metadata:
                self._gone.setdefault(metadata["digest"], []).append(item_id)
        decision = decide(
            candidates,
            self._known,
            self.failures,
            table=table,
            id_prefix=id_prefix,
            min_size=self.settings.min_size,
            needed=self.needed,
        )
        self.summary.unchanged = decision.num_unchanged
        for candidate, skipped in decision.skipped:
            self.refuse(candidate, skipped)
        return decision.pending

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields without which an item is made again."""
        return () if self.reader is None else ("text",)

    def add(self, pending: Sequence[Candidate]) -> None:
        """Reads, computes and commits; raises DataError when the index cannot be written.

        SIGTERM or Ctrl-C ends it early, with all kept that was computed; `summary.signal` says so.
        """
        stop = StopRequest()
        done = self.summary.unchanged + skips.num_remembered(self.summary.skipped)
        with stop.noted(), self.progress.over(done + len(pending), done=done):
            self.read(pending, stop)
            self.commit()
        self.summary.signal = stop.number

    def read(self, pending: Sequence[Candidate], stop: StopRequest | None = None) -> None:
        """As `add`, but for what `commit` is still to write."""
        if not pending:
            return
        if self.few is not None:
            self._ask_owners(pending)
        stop = stop or StopRequest()
        self._expected = deque(one.id for one in pending if one.id in self._known)
        batches = self._batches(pending)
        self._committed_at = time.monotonic()
        for batch, vectors in stop.until(batches):
            self._take(batch, vectors)
            self.progress.advance(len(batch))
            if self.is_commit_due:
                self.commit()

    def _batches(self, pending: Sequence[Candidate]) -> "Iterator[tuple[list[_Prepared | _Refused], dict[int, Rows]]]":
        encoder = self.encoder()

        def load(number: int, out: AnyPixels) -> _Prepared | _Refused:
            candidate, data = pending[number], b""
            try:
                data = candidate.read()
                digest = _digest_of(data)
                is_outdated = digest in self._owners and self.is_outdated(data)
                if digest in self._owners and not is_outdated:
                    return _Prepared(
                        candidate, data, digest, True, facts.of_bytes(data) | self._words(data, digest), b""
                    )
                image = self._opened(data)
                found = facts_of(image) | self._words(data)
                if skipped := skips.too_small(candidate.id, found, self.settings.min_size):
                    return _Refused(candidate, skipped)
                write_pixels(encoder.transform, image, out)
                return _Prepared(candidate, b"", digest, False, found, self.thumbnail(image), is_outdated)
            except OSError as error:
                reason = f"cannot be read ({reason_of(error)})"
                return _Refused(candidate, Skipped(candidate.id, reason, skips.UNREADABLE, is_gone=False))
            except (DataError, MissingExtraError, ValueError) as error:
                size = candidate.metadata.get("size", len(data))  # nothing was read of one that is too large
                kind = skips.kind_of(error, num_bytes=size)
                return _Refused(candidate, Skipped(candidate.id, str(error), kind))

        decoded = decoded_batches(
            load, range(len(pending)), encoder.room, self.settings.batch_size, self.settings.num_workers
        )
        return _computed(encoder, decoded)

    def keep(self, items: Iterable[NewItem]) -> None:
        """Adds items as they are with the next commit, unless a picture of the same id comes before it."""
        self._buffer.update({item.id: item for item in items})

    @property
    def num_waiting(self) -> int:
        """Items that the next commit writes."""
        return len(self._buffer)

    @property
    def is_commit_due(self) -> bool:
        """Whether so much waits, or has waited so long, that it is to be written."""
        is_late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return self._is_full or (is_late and self.settings.commit_every is not None)

    @property
    def _is_full(self) -> bool:
        return self.settings.commit_every is not None and self.num_waiting >= self.settings.commit_every

    def prune(self, sources: Collection[str], candidates: Collection[Candidate], *, with_folders: bool = True) -> None:
        """Removes the items of these sources that are not there any more; raises DataError where none would be left.

        with_folders: also those of large folders that are gone, see `pruning`.
        """
        kept = {one.id for one in candidates} - {one.id for one in self.summary.skipped if one.is_gone}
        unread = tuple(f"{one.id}/" for one in self.summary.skipped if not one.is_gone)
        gone = [
            item_id
            for item_id, metadata in self.writer.items()
            if metadata.get("source") in sources
            and (file := file_id(item_id, metadata)) not in kept
            and not f"{file}/".startswith(unread)
        ]
        if gone and not kept:
            raise DataError(
                f"none of the {len(gone)} pictures is there any more, so nothing was removed: see that the disk is "
                "there, or remove them with cn-clip index remove, or give --keep-missing"
            )
        if not with_folders:
            present = [*(one.id for one in candidates), *(one.id for one in self.summary.skipped)]
            digests = {self._known[one].get("digest") for one in kept if one in self._known}
            self.summary.missing = vanished(
                gone,
                present,
                len(self.writer),
                is_elsewhere=lambda one: self._known[one].get("digest", "") in digests,
            )
            away = {one for ids in self.summary.missing.values() for one in ids}
            gone = [one for one in gone if one not in away]
        for source in filter(None, sources):
            self.failures.forget(source, but={one.metadata.get("path", "") for one in candidates})
        self.writer.commit(remove=gone, notes=self.failures.dumped() if self.failures.has_changed else None)
        self.summary.removed = gone
        removed = set(gone)
        self.summary.duplicates = [pair for pair in self.summary.duplicates if pair[1] not in removed]

    def _take(self, batch: Sequence[_Prepared | _Refused], vectors: Mapping[int, Rows]) -> None:
        """vectors: of the fresh ones, by their number in the batch."""
        lending = {self._owners[one.digest] for one in batch if self._is_owned(one)}
        self._lenders = {one: self._buffer[one] for one in lending if one in self._buffer}
        expected = {one.candidate.id for one in batch}
        while self._expected and self._expected[0] in expected:
            self._expected.popleft()
        soon = itertools.islice(self._expected, MOST_READ_AHEAD)
        self._lenders |= self.writer.stored(lending - self._lenders.keys(), soon=soon)
        for number, one in enumerate(batch):
            if isinstance(one, _Refused):
                self.refuse(one.candidate, one.skipped)
            elif self._is_owned(one):
                owner = self._owners[one.digest]
                stored = self._lenders[owner]
                found = dict(one.facts)
                found |= {name: stored.metadata[name] for name in _OF_BYTES if name in stored.metadata}
                if skipped := skips.too_small(one.candidate.id, found, self.settings.min_size):
                    self.refuse(one.candidate, skipped)
                    continue
                before = self._known.get(one.candidate.id)
                if before == {**found, **one.candidate.metadata, "digest": one.digest}:
                    self.summary.unchanged += 1
                    continue
                if before is None:
                    one = self._renamed(one)
                if owner != one.candidate.id:
                    self.summary.duplicates.append((one.candidate.id, owner))
                self.summary.reused += 1
                self._put(one, stored.vector_D, found, stored.thumbnail)
            elif one.known:  # its owner has changed since
                image = self._opened(one.data)
                late = self.encoder().transform.array(image)
                found = {**one.facts, **facts_of(image)}
                with named("id", [one.candidate.id].__getitem__):
                    vector_D = self.encoder().encode_pixels(late[None])[0]
                self.summary.encoded += 1
                self._put(one, vector_D, found, self.thumbnail(image))
            else:
                self.summary.encoded += 1
                self._put(one, vectors[number], one.facts, one.thumbnail)

    def thumbnail(self, image: Image.Image) -> bytes:
        """The small picture that the settings ask for, and the index has room for; b"" for none."""
        size = self.settings.thumbnail_size
        return thumbnail(image, size, self.writer.largest_thumbnail) if size else b""

    def _opened(self, data: bytes) -> Image.Image:
        """The picture as the model and people see it, perhaps at a fraction of its size; raises DataError."""
        encoder = self.encoder()
        return open_picture(data, encoder.transform.draft_size, upright=encoder.upright)

    def _words(self, data: bytes, digest: str = "") -> dict[str, str]:
        """The field of the words in a picture, if they are to be read; digest: those of an item of it are taken."""
        if self.reader is None:
            return {}
        known = self._known.get(self._owners.get(digest, ""), {})
        if "text" in known:
            return {"text": known["text"]}
        # Larger than the model may see it, which is at a fraction of its size.
        return {"text": self.reader.read(open_picture(data, LONGEST_SIDE, upright=True))}

    def _is_owned(self, one: _Prepared | _Refused) -> TypeGuard[_Prepared]:
        return isinstance(one, _Prepared) and one.digest in self._owners and not one.is_outdated

    def _renamed(self, one: _Prepared) -> _Prepared:
        """A new picture with what was known of the one that is gone and had the same bytes, if there is one."""
        gone, name = self._gone.get(one.digest, []), posixpath.basename(str(one.candidate.id))
        if not gone:
            return one
        was = next((item_id for item_id in gone if posixpath.basename(str(item_id)) == name), gone[0])
        self.summary.renamed.append((one.candidate.id, was))
        kept = parted(self._known[was])[1]
        return replace(one, candidate=replace(one.candidate, metadata={**kept, **one.candidate.metadata}))

    def refuse(self, candidate: Candidate, skipped: Skipped) -> None:
        """Counts a file that does not go into the index, and remembers it for the next run."""
        self.summary.skipped.append(skipped)
        if not skipped.is_remembered:
            self.failures.note(candidate.metadata, skipped)

    def _put(self, one: _Prepared, vector_D: Any, found: Mapping[str, Any], small: bytes) -> None:
        item_id = one.candidate.id
        replaced: str = self._known.get(item_id, {}).get("digest", "")
        if replaced != one.digest and self._owners.get(replaced) == item_id:
            del self._owners[replaced]
        self._owners.setdefault(one.digest, item_id)
        metadata = {**found, **one.candidate.metadata, "digest": one.digest}
        self._known[item_id] = metadata
        self.failures.drop(metadata)
        self._buffer[item_id] = self._lenders[item_id] = NewItem(item_id, np.array(vector_D), metadata, small)
        if self._is_full:
            self.commit()

    def commit(self) -> None:
        """Writes what was read, and reports it."""
        notes = self.failures.dumped() if self.failures.has_changed else None
        self.writer.commit(list(self._buffer.values()), notes=notes)
        self._buffer.clear()
        self.failures.has_changed = False
        self._committed_at = time.monotonic()
        self.progress.saved(self.summary.num_done, self.summary.encoded + self.summary.reused)


def _digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def facts_of(image: Image.Image) -> dict[str, Any]:
    """What the opened picture says of itself: the values of `sources.PICTURE_FIELDS`, as far as it has them."""
    width, height = full_size(image)
    return {**facts.of_picture(image), "width": width, "height": height}


def _computed(
    encoder: Encoder, decoded: Iterable[tuple[list[_Prepared | _Refused], AnyPixels]]
) -> Iterator[tuple[list[_Prepared | _Refused], dict[int, Rows]]]:
    """Each batch with the vectors of its fresh pictures, by number; raises NotFiniteError naming one without."""
    ids, done = list[ItemId](), 0

    def of_fresh() -> Iterator[tuple[tuple[list[_Prepared | _Refused], list[int]], AnyPixels]]:
        for batch, pixels in decoded:
            fresh = {number: one for number, one in enumerate(batch) if isinstance(one, _Prepared) and not one.known}
            ids.extend(one.candidate.id for one in fresh.values())
            for place, number in enumerate(fresh):
                if place < number:
                    pixels[place] = pixels[number]
            yield (batch, list(fresh)), pixels[: len(fresh)]

    with named("id", lambda position: ids[done + position]):
        for (batch, fresh), rows in encoder.pixel_rows(of_fresh()):
            done += len(rows)
            yield batch, dict(zip(fresh, rows, strict=True))
