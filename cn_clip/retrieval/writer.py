"""Changes an index on disk, so that a process killed at any moment loses nothing that a commit returned from."""

# N rows of all segments, removed ones included, D dimensions

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.digests import facts_of, is_folder, is_there, is_whole
from cn_clip.errors import ConfigError, DataError, UnreadableError
from cn_clip.files import alone, atomic_write, is_temporary, sync_folder
from cn_clip.retrieval import manifest
from cn_clip.retrieval.conditions import Condition
from cn_clip.retrieval.derived import unfit, wanted, write_derived
from cn_clip.retrieval.engine_table import ENGINES
from cn_clip.retrieval.engines import Rows
from cn_clip.retrieval.graph import SMALLEST_GRAPH, Kind, extended_graph, new_graph
from cn_clip.retrieval.ids import integers
from cn_clip.retrieval.manifest import DerivedFacts, EngineName, Manifest, PictureFacts, SegmentFacts, VectorType
from cn_clip.retrieval.parts import Part
from cn_clip.retrieval.query import ItemTable
from cn_clip.retrieval.segments import (
    BLOCK_ROWS,
    DIGESTS,
    IntArray,
    ItemId,
    Mask,
    RowBlock,
    Segment,
    facts_of_segment,
    item_line,
    write_segment,
)
from cn_clip.retrieval.store import Snapshot, alive, open_rows, removed_keys

LOCK = ".lock"
BUILDING = ".building"
# A generation as it was before a repair, by its number: an index of its own.
ASIDE = "before-repair-"
# The files of an index that `atomic_write` writes, as the names of its temporary folders begin.
_WRITTEN = re.compile(r"\.(manifest\.json|removed-[0-9]{6,}\.npy|notes-[0-9]{6,}\.jsonl)\..*")
# So many segments of like size become one: then an index of n commits has some log(n) of them.
SEGMENTS_OF_A_SIZE = 8
# All is written anew once this share of the rows is removed.
LARGEST_SHARE_REMOVED = 0.25


@dataclass(frozen=True)
class NewItem:
    """An item to add. vector_D: finite, as long as the index wants; metadata: what JSON holds; thumbnail: a JPEG."""

    id: ItemId
    vector_D: NDArray[np.floating]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes = b""


@contextlib.contextmanager
def open_writer(
    folder: Path, create: Manifest | None = None, *, without: Collection[str] = ()
) -> "Iterator[IndexWriter]":
    """The one writer of an index; leaving the context gives the lock back, and does nothing else.

    create: what to begin with where there is no index yet. without: damaged segments, which no longer count from
    the first commit on. Raises ConfigError when another process is writing or the folder holds something else,
    DataError when the index cannot be read or the folder not be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            if create is not None:
                folder.mkdir(parents=True, exist_ok=True)
                _refuse_strange(folder)
            elif not is_folder(folder):
                manifest.read(folder)
            stack.enter_context(alone(folder / LOCK, f"{folder}: another process is changing this index"))
        except UnreadableError:
            raise
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror}); choose another folder", at=folder) from error
        if create is not None and not is_there(folder / manifest.NAME):
            _refuse_strange(folder)
            ENGINES[create.engine].require()
            manifest.write(folder, create)
        facts = manifest.read(folder)
        if without:
            kept = replace(facts, segments=tuple(one for one in facts.segments if one.name not in without))
            rows = open_rows(folder, kept)
            alive_N = alive(rows, removed_keys(folder, facts))
            snapshot = Snapshot(folder, replace(kept, num_items=int(alive_N.sum())), rows, alive_N)
        else:
            snapshot = Snapshot.open(folder, facts)
        yield IndexWriter(snapshot, is_mended=bool(without))


def _refuse_strange(folder: Path) -> None:
    """Raises ConfigError for a folder that is not an index and not empty."""
    names = set(os.listdir(folder))
    strange = sorted(name for name in names if name != LOCK and not _is_temporary(name))
    if strange and manifest.NAME not in names:
        raise ConfigError(f"is no index and holds {strange[0]!r}; choose an empty folder or a new name", at=folder)


def _is_temporary(name: str) -> bool:
    return name == BUILDING or bool(is_temporary(name) and _WRITTEN.fullmatch(name))


class IndexWriter:
    """Adds and removes items. Every commit is a generation that readers see whole."""

    # Bytes.
    largest_thumbnail: int | None = None

    def __init__(self, snapshot: Snapshot, *, is_mended: bool = False) -> None:
        """is_mended: the snapshot differs from what is on disk, until the first commit."""
        self._snapshot, self._is_mended = snapshot, is_mended
        self._removed = removed_keys(self.folder, self.manifest)
        self._graph_is_old = False
        if not is_mended:
            self._tidy()

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self._snapshot.folder

    @property
    def manifest(self) -> Manifest:
        """The generation on disk."""
        return self._snapshot.manifest

    def __len__(self) -> int:
        return self.manifest.num_items

    def __contains__(self, item_id: object) -> bool:
        return type(item_id) in (int, str) and bool(self._snapshot.positions_of([item_id]))  # type: ignore[list-item]

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        for _, item_id, metadata in self._snapshot.items():
            yield item_id, metadata

    def known(self, ids: Iterable[ItemId]) -> dict[ItemId, dict[str, Any]]:
        """The metadata of those of the items that the index has."""
        positions = self._snapshot.positions_of(list(dict.fromkeys(ids)))
        items = ((one, self._snapshot.rows.segment_of(position)) for one, position in positions.items())
        return {one: segment.item(row)[1] for one, (segment, row) in items}

    def called(self, names: Sequence[str]) -> dict[str, ItemId]:
        """The ids that are written as these names, for those that are; of 7 and "7" the later item."""
        of_name: dict[str, list[ItemId]] = {name: [name, *integers(name)] for name in names}
        positions = self._snapshot.positions_of([one for ids in of_name.values() for one in ids])
        found = {name: [one for one in ids if one in positions] for name, ids in of_name.items()}
        return {name: max(ids, key=positions.__getitem__) for name, ids in found.items() if ids}

    def fitting(self, condition: Condition) -> list[ItemId]:
        """The ids of the items that fit; raises ConfigError for a field that no item has."""
        rows = self._snapshot.rows
        table = ItemTable(rows.segments, self._snapshot.alive_N)
        positions = np.flatnonzero(table.mask(condition)).tolist()
        return [segment.item(row)[0] for segment, row in map(rows.segment_of, positions)]

    def stored(self, ids: Iterable[ItemId], *, soon: Iterable[ItemId] = ()) -> dict[ItemId, NewItem]:
        """Those of the items that the index has, as they would be added again.

        soon: others that may be asked for next, which a store on another machine reads with them.
        """
        del soon
        found, wanted = {}, list(dict.fromkeys(ids))
        positions = self._snapshot.positions_of(wanted)
        for item_id in wanted:
            if item_id in positions:
                segment, row = self._snapshot.rows.segment_of(positions[item_id])
                vector_D = segment.vectors(row, row + 1)[0]
                found[item_id] = NewItem(item_id, vector_D, segment.item(row)[1], segment.thumbnail(row))
        return found

    def describe(self, *, engine: EngineName | None, source: str, pictures: PictureFacts | None = None) -> None:
        """Sets what the manifest says besides the items. engine, pictures: None keeps it."""
        engine, pictures = engine or self.manifest.engine, pictures or self.manifest.pictures
        ENGINES[engine].require()
        if (engine, source, pictures) != (self.manifest.engine, self.manifest.source, self.manifest.pictures):
            graph = self.manifest.graph if ENGINES[engine].has_graph else None
            self._write(replace(self.manifest, engine=engine, source=source, graph=graph, pictures=pictures))
            self._tidy()

    def notes(self) -> bytes:
        """What was noted with the commits before; nothing where that is damaged, or cannot be read."""
        if self.manifest.notes is not None:
            with contextlib.suppress(DataError):
                return manifest.read_whole(self.folder / self.manifest.notes.name, self.manifest.notes.file)
        return b""

    def commit(
        self, items: Sequence[NewItem] = (), remove: Iterable[ItemId] = (), *, notes: bytes | None = None
    ) -> None:
        """Adds items, which replace those of the same id, and removes others; ids that are not there are passed over.

        notes: what the next writer is to know, lines of JSON; None keeps what was noted.

        When it returns, the change is on disk; before that, readers see none of it. Raises DataError, with nothing
        changed, for an id that comes twice, a vector of another length or not finite, metadata that JSON cannot hold,
        and when the disk is full. If only merging small segments fails, the change counts, and the error says so.
        """
        lines = checked_lines(items, self.manifest.model.embed_dim, self.manifest.vector_type)
        dropped = list(dict.fromkeys([*remove, *(item.id for item in items)]))
        positions = self._snapshot.positions_of(dropped)
        gone = [segment.key(row) for segment, row in map(self._snapshot.rows.segment_of, positions.values())]
        if not items and not gone and not self._is_mended and notes is None:
            return
        first = self.manifest.next_key
        with self._writing():
            added = [self._write_segment(_blocks(items, lines, first), len(items))] if items else []
            removed = np.union1d(self._removed, np.array(gone, dtype=np.int64))
            facts = replace(
                self.manifest,
                next_key=first + len(items),
                segments=(*self.manifest.segments, *added),
                notes=self.manifest.notes if notes is None else self._write_notes(notes),
            )
            self._change(facts, removed)
        self._is_mended = False
        self._graph_is_old |= bool(gone)
        counted = f"the {len(items)} added and {len(gone)} removed items count; merging its segments failed"
        with self._writing(counted):
            try:
                self._merge()
            except DataError as error:  # a damaged segment, or one that cannot be read just now
                error.args = (f"{error}; {counted}",)
                raise
        self._tidy()

    def keep_aside(self) -> Path:
        """Makes the generation on disk, damaged as it is, an index of its own in this folder; returns its path.

        Its files are links to the same bytes, and take no room until this index does without them; copies on a disk
        that has no links. Raises DataError when they cannot be made.
        """
        facts = manifest.read(self.folder)
        building, path = self.folder / BUILDING, self.folder / f"{ASIDE}{facts.generation:06d}"
        with self._writing():
            for rubbish in (building, path):
                _remove(rubbish)
            for name in (manifest.NAME, *(path for path, _ in facts.files())):
                if not is_there(self.folder / name):
                    continue
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self.folder / name, building / name)
                except OSError:  # a disk without links, or too many of them
                    shutil.copy2(self.folder / name, building / name)
                    with open(building / name, "rb+") as stream:
                        os.fsync(stream.fileno())
            os.replace(building, path)
            sync_folder(self.folder)
        return path

    def finish(self) -> None:
        """Brings the graph up to the items, where the engine has one; a damaged one is built anew.

        Damaged notes are dropped: the next run finds out again what was noted. Upgrades, too.
        """
        facts = self.manifest
        if facts.notes is not None and not self.notes():
            with self._writing():
                self._write(replace(facts, notes=None))
        self.upgrade()
        facts = self.manifest
        if not ENGINES[facts.engine].has_graph:
            return
        graph, is_newest = facts.graph, False
        if graph is not None and graph.next_key == facts.next_key and not self._graph_is_old:
            with contextlib.suppress(OSError):
                is_newest = is_whole(self.folder / graph.name, graph.file)
        with self._writing():
            if len(self) < SMALLEST_GRAPH:
                if graph is not None:
                    self._write(replace(facts, graph=None))
            elif not is_newest:
                rows, alive_N, made = self._snapshot.rows, self._snapshot.alive_N, None
                if graph is not None:  # goes on with it, or starts anew where it is missing or damaged
                    with contextlib.suppress(DataError):
                        path = self.folder / graph.name
                        made = extended_graph(
                            path, graph.file, rows, alive_N, graph.next_key, Kind(graph.scale, graph.width)
                        )
                if made is None:
                    made = new_graph(rows, alive_N)
                building, path = self.folder / BUILDING, self._fresh("graph", ".usearch")
                for rubbish in (building, path):
                    _remove(rubbish)
                try:
                    made.save(building)
                except DataError as error:  # all that usearch says of a full disk
                    raise OSError(errno.EIO, str(error)) from error
                with open(building, "rb+") as stream:
                    os.fsync(stream.fileno())
                os.replace(building, path)
                self._write(replace(facts, graph=DerivedFacts(path.name, facts_of(path), facts.next_key, *made.kind)))
        self._graph_is_old = False
        self._tidy()

    def upgrade(self, damaged: Collection[str] = ()) -> None:
        """Makes what follows from the segments and versions before did not: their largest norms, and derived files.

        damaged: paths of derived files to make again. Does without those of a segment that is damaged itself, or cannot
        be read just now.
        """
        segments = []
        for segment, facts in zip(self._snapshot.rows.segments, self.manifest.segments, strict=True):
            broken = {Path(path).name.removesuffix(DIGESTS) for path in damaged if Path(path).parent.name == facts.name}
            kept = {name: one for name, one in facts.files.items() if name.removesuffix(DIGESTS) not in broken}
            lacking = wanted(self.manifest, len(segment)) - (kept.keys() - unfit(segment))
            with contextlib.suppress(DataError):
                facts = replace(facts, largest_norm=segment.largest_norm)
            facts = replace(facts, files=kept)
            if lacking:
                with contextlib.suppress(DataError), self._writing():
                    parts = [Part.whole(self._open(facts))]
                    facts = replace(facts, files={**kept, **write_derived(segment.folder, parts, lacking, facts)})
            segments.append(facts)
        generation = replace(self.manifest, segments=tuple(segments))
        if generation != self.manifest or damaged:
            with self._writing():
                self._change(generation, self._removed, renew=True)

    def _change(self, facts: Manifest, removed: IntArray, *, renew: bool = False) -> None:
        """Writes a generation of other segments or other removed rows. renew: opens all segments again."""
        segments = {segment.folder.name: segment for segment in self._snapshot.rows.segments if not renew}
        rows = Rows([segments.get(one.name) or self._open(one) for one in facts.segments])
        positions = rows.positions_of(removed)
        removed = np.sort(rows.keys_at(positions))
        alive_N: Mask = np.ones(len(rows), dtype=np.bool_)
        alive_N[positions] = False
        entry = None
        if len(removed):
            path, content = self._fresh("removed", ".npy"), BytesIO()
            np.save(content, removed)
            with atomic_write(path, "wb") as stream:
                stream.write(content.getvalue())
            entry = DerivedFacts(path.name, facts_of(path), self.manifest.next_key)
        facts = manifest.write(self.folder, replace(facts, removed=entry, num_items=int(alive_N.sum())))
        self._snapshot, self._removed = Snapshot(self.folder, facts, rows, alive_N), removed

    def _write_notes(self, notes: bytes) -> DerivedFacts | None:
        if not notes:
            return None
        path = self._fresh("notes", ".jsonl")
        with atomic_write(path, "wb") as stream:
            stream.write(notes)
        return DerivedFacts(path.name, facts_of(path), self.manifest.next_key)

    def _write(self, facts: Manifest) -> None:
        self._snapshot = replace(self._snapshot, manifest=manifest.write(self.folder, facts))

    def _open(self, facts: SegmentFacts) -> Segment:
        return Segment(self.folder / facts.name, facts, self.manifest.model.embed_dim, self.manifest.vector_type)

    def _fresh(self, kind: str, suffix: str = "") -> Path:
        """A path that no generation has used."""
        return self.folder / f"{kind}-{self.manifest.generation + 1:06d}{suffix}"

    def _write_segment(self, blocks: Iterable[RowBlock], num_rows: int, parts: Sequence[Part] = ()) -> SegmentFacts:
        """parts: those that it consists of, where the rows come from other segments."""
        building, path = self.folder / BUILDING, self._fresh("segment")
        for rubbish in (building, path):
            _remove(rubbish)
        largest = write_segment(building, blocks, num_rows, self.manifest.model.embed_dim, self.manifest.vector_type)
        os.replace(building, path)
        sync_folder(self.folder)
        facts = facts_of_segment(path, num_rows, largest)
        if names := wanted(self.manifest, num_rows):
            parts = parts or [Part.whole(self._open(facts))]
            facts = replace(facts, files={**facts.files, **write_derived(path, parts, names, facts)})
        return facts

    def _merge(self) -> None:
        segments = self._snapshot.rows.segments
        count = _num_to_merge([len(segment) for segment in segments])
        if len(self._removed) > LARGEST_SHARE_REMOVED * self.manifest.num_rows:
            count = len(segments)
        if not count:
            return
        first = len(segments) - count
        alive_N, starts = self._snapshot.alive_N, self._snapshot.rows.starts
        parts = [
            Part(segment, alive_N[start : start + len(segment)])
            for segment, start in zip(segments[first:], starts[first:], strict=False)
        ]
        num_rows = sum(part.num_rows for part in parts)
        blocks = (block for part in parts for block in part.segment.blocks(part.kept_N))
        merged = [self._write_segment(blocks, num_rows, parts)] if num_rows else []
        self._change(replace(self.manifest, segments=(*self.manifest.segments[:first], *merged)), self._removed)

    def _tidy(self) -> None:
        """Removes what no manifest names: of commits that were killed, and of generations before."""
        counted = self.manifest.names()
        for entry in self.folder.iterdir():
            if _is_temporary(entry.name) or (manifest.is_own(entry.name) and entry.name not in counted):
                with contextlib.suppress(OSError):  # Windows removes nothing that a reader has mapped
                    _remove(entry)

    @contextlib.contextmanager
    def _writing(self, done: str = "all that was reported done is kept") -> Iterator[None]:
        """Turns an error of the disk into one that says what is `done` all the same."""
        try:
            yield
        except UnreadableError:  # it names the file
            raise
        except OSError as error:
            with contextlib.suppress(OSError):  # of no use, and on a full disk in the way
                _remove(self.folder / BUILDING)
            raise DataError(
                f"cannot be written ({error.strerror or error}); {done}: free some space and run the command again",
                at=self.folder,
            ) from error


def checked_lines(items: Sequence[NewItem], embed_dim: int, vector_type: VectorType) -> list[bytes]:
    """How the items lie in a segment; raises DataError for those that `IndexWriter.commit` refuses."""
    if len({item.id for item in items}) < len(items):
        ids = [item.id for item in items]
        raise DataError(f"id {next(one for one in ids if ids.count(one) > 1)!r}: comes twice in one commit")
    for item in items:
        if item.vector_D.shape != (embed_dim,):
            raise DataError(
                f"id {item.id!r}: expected a vector of {embed_dim} numbers, got the shape {item.vector_D.shape}"
            )
    for start in range(0, len(items), BLOCK_ROWS):
        block = items[start : start + BLOCK_ROWS]
        with np.errstate(over="ignore"):
            is_finite_W = np.isfinite(_stacked(block).astype(vector_type)).all(axis=1)
        if not is_finite_W.all():
            faulty = block[int(np.argmin(is_finite_W))].id
            raise DataError(f"id {faulty!r}: its vector holds NaN, infinity or what becomes infinity")
    return [item_line(item.id, item.metadata) for item in items]


def _stacked(items: Sequence[NewItem]) -> NDArray[np.floating]:
    return np.stack([item.vector_D for item in items])


def _blocks(items: Sequence[NewItem], lines: Sequence[bytes], first_key: int) -> Iterator[RowBlock]:
    """The items as they are written."""
    for start in range(0, len(items), BLOCK_ROWS):
        part = items[start : start + BLOCK_ROWS]
        ended = [line + b"\n" for line in lines[start : start + BLOCK_ROWS]]
        yield RowBlock(
            np.arange(first_key + start, first_key + start + len(part)),
            _stacked(part),
            b"".join(ended),
            np.array([len(line) for line in ended]),
            b"".join(item.thumbnail for item in part),
            np.array([len(item.thumbnail) for item in part]),
        )


def _num_to_merge(sizes: Sequence[int]) -> int:
    """How many of the last segments become one, or 0.

    They are those of at most 1 row, or 8, or 64, ..., if these are eight or more, and if together they have twice the
    rows of the largest: a large segment is not written anew for few rows more.

    [9, 1, 1, 1, 1, 1, 1, 1, 1] -> 8: the segments of 1 row become one of 8; that of 9 rows stays.
    [8, 1, 1, 1, 1, 1, 1, 1] -> 0: seven of 1 row; eight of at most 8 rows, but 15 rows are less than twice 8.
    [8, 8, 1, 1, 1, 1, 1, 1] -> 8: eight of at most 8 rows become one of 22.
    """
    bound = 1
    while True:
        count = next((n for n, size in enumerate(reversed(sizes)) if size > bound), len(sizes))
        merged = sizes[len(sizes) - count :]
        if count >= SEGMENTS_OF_A_SIZE and sum(merged) >= 2 * max(merged):
            return count
        if count == len(sizes):
            return 0
        bound *= SEGMENTS_OF_A_SIZE


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
