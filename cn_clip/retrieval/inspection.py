"""Reads every byte of an index: which files are damaged, and which items of a damaged segment can still be read."""

# N rows of a segment, D dimensions

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cn_clip.digests import facts_of, is_file
from cn_clip.errors import DataError, is_absent, reason_of
from cn_clip.retrieval import manifest
from cn_clip.retrieval.derived import unfit
from cn_clip.retrieval.engines import BLOCK
from cn_clip.retrieval.ids import coming_twice, hashes_of
from cn_clip.retrieval.manifest import Manifest, SegmentFacts
from cn_clip.retrieval.segments import (
    BLOCKS,
    FILES,
    ITEM_END,
    ITEMS,
    KEY,
    ROWS,
    THUMBNAIL_END,
    THUMBNAILS,
    VECTORS,
    IntArray,
    ItemId,
    MappedFile,
    Mask,
    Segment,
    block_digests,
)
from cn_clip.retrieval.store import Snapshot, removed_keys, was_replaced
from cn_clip.retrieval.writer import NewItem


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file of an index. path: in its folder; is_unread: it may be whole, the disk does not say."""

    path: str
    reason: str
    is_unread: bool = False

    @property
    def owner(self) -> str:
        """The segment or derived file that suffers."""
        return self.path.split("/")[0]

    @property
    def is_derived(self) -> bool:
        """Whether it can be made again from the other files of its segment."""
        _, _, name = self.path.partition("/")
        return bool(name) and name not in (*FILES, BLOCKS)


def inspect(folder: Path) -> tuple[Manifest, list[Damage]]:
    """The newest generation of an index, and all its damaged files; files that it does not name are not looked at.

    A writer may go on meanwhile: files that it removes are not reported, and those that it adds are read, too.
    """
    seen: dict[str, Damage | None] = {}
    while True:
        facts = manifest.read(folder)
        if fresh := [(path, expected) for path, expected in facts.files() if path not in seen]:
            for path, expected in fresh:
                seen[path] = None
                try:
                    there = facts_of(folder / path)
                except OSError as error:
                    if is_absent(error):
                        seen[path] = Damage(path, "is missing")
                    else:
                        reason = f"cannot be read just now ({reason_of(error)})"
                        seen[path] = Damage(path, reason, is_unread=True)
                    continue
                if there.bytes != expected.bytes:
                    seen[path] = Damage(path, f"expected {expected.bytes} bytes, found {there.bytes}")
                elif there != expected:
                    seen[path] = Damage(path, "its bytes have changed")
            continue
        if found := [damage for path, _ in facts.files() if (damage := seen[path]) is not None]:
            return facts, found
        try:  # what no crash can cause, only a fault of a program
            snapshot = Snapshot.open(folder, facts)
            if num_twice := _num_twice(snapshot):
                found.append(Damage(manifest.NAME, f"{num_twice} ids come twice"))
            for segment in snapshot.rows.segments:
                blocks = (segment.vectors(start, start + BLOCK) for start in range(0, len(segment), BLOCK))
                if not all(np.isfinite(block).all() for block in blocks):
                    found.append(Damage(f"{segment.folder.name}/{VECTORS}", "holds NaN or infinity"))
                for name in sorted(unfit(segment)):
                    found.append(Damage(f"{segment.folder.name}/{name}", "is not of the vectors of its segment"))
            return facts, found
        except DataError:
            if not was_replaced(folder, facts):
                raise


def _num_twice(snapshot: Snapshot) -> int:
    """How many items have the id of another one. Memory: 16 bytes an item."""
    hashes_N = np.sort(hashes_of(item_id for _, item_id, _ in snapshot.items()))
    twice = coming_twice(hashes_N)
    if not twice:
        return 0
    ids = [one for _, one, _ in snapshot.items() if hashes_of([one])[0] in twice]
    return len(ids) - len(set(ids))


@dataclass(frozen=True)
class Remains:
    """The items of a damaged segment that its other files, and the whole blocks of the damaged ones, still tell of.

    num_lost: items without a name. whole: those that nothing is wrong with; with_vectors: those whose vectors are
    whole, the others have zeros; bare: those whose thumbnails are gone.
    """

    items: Sequence[NewItem] = ()
    num_lost: int = 0
    whole: frozenset[ItemId] = frozenset()
    with_vectors: frozenset[ItemId] = frozenset()
    bare: frozenset[ItemId] = frozenset()


def remains(folder: Path, facts: Manifest, name: str, damaged: set[str]) -> Remains:
    """What can be read of the segment `name`. damaged: its damaged files.

    Only rows.npy says which rows were removed. Without it, all of the segment is lost if any were, or if items.jsonl is
    damaged, too. Of a damaged items.jsonl the lines count that parse and whose id is that of their path.
    """
    segment = next(one for one in facts.segments if one.name == name)
    table_N3 = None if ROWS in damaged else np.load(folder / name / ROWS, allow_pickle=False)
    removed = removed_keys(folder, facts)
    if table_N3 is None and (ITEMS in damaged or len(removed)):
        return Remains(num_lost=segment.num_rows)
    alive = np.arange(segment.num_rows) if table_N3 is None else np.flatnonzero(~np.isin(table_N3[:, KEY], removed))
    vectors_ND, has_vector_N = _vectors(folder, facts, segment, damaged)
    lines = _lines(folder / name / ITEMS, table_N3)
    thumbnails, has_thumbnail_N = _thumbnails(folder, segment, table_N3, damaged)
    found: dict[ItemId, tuple[int, NewItem]] = {}
    for row in alive.tolist():
        try:
            item_id, metadata = Segment.parse(lines[row], lambda: ITEMS)
        except DataError:
            continue
        path, source = metadata.get("path"), metadata.get("source")
        if ITEMS in damaged and isinstance(path, str) and isinstance(source, str):
            relative = os.path.relpath(path, source).replace(os.sep, "/")
            # Items of feature shards are of pictures that lie elsewhere.
            if not (relative.startswith("../") or str(item_id).endswith(relative)):
                continue
        found[item_id] = row, NewItem(item_id, vectors_ND[row], metadata, thumbnails[row])
    is_certain = ITEMS not in damaged and ROWS not in damaged
    return Remains(
        [item for _, item in found.values()],
        len(alive) - len(found),
        whole=frozenset(
            one for one, (row, _) in found.items() if is_certain and has_vector_N[row] and has_thumbnail_N[row]
        ),
        with_vectors=frozenset(one for one, (row, _) in found.items() if has_vector_N[row]),
        bare=frozenset(one for one, (row, _) in found.items() if not has_thumbnail_N[row]),
    )


def _vectors(
    folder: Path, facts: Manifest, segment: SegmentFacts, damaged: set[str]
) -> tuple[NDArray[np.floating], Mask]:
    """(vectors, whether they are whole) of all rows; zeros where they are not."""
    dtype, num_rows = np.dtype(facts.vector_type), segment.num_rows
    width = facts.model.embed_dim * dtype.itemsize
    first = segment.files[VECTORS].bytes - num_rows * width
    starts_N = first + width * np.arange(num_rows)
    file, is_whole_N = _readable(folder, segment, VECTORS, damaged, starts_N, starts_N + width)
    vectors_ND = np.zeros((num_rows, facts.model.embed_dim), dtype=dtype)
    if file is not None:
        kept_ND: NDArray[np.floating] = np.ndarray(vectors_ND.shape, dtype, buffer=file.data, offset=first)
        vectors_ND[is_whole_N] = kept_ND[is_whole_N]
    return vectors_ND, is_whole_N


def _thumbnails(
    folder: Path, segment: SegmentFacts, table_N3: IntArray | None, damaged: set[str]
) -> tuple[list[bytes], Mask]:
    """(thumbnails, whether they are whole) of all rows, empty where they are not; one that never was is whole."""
    nothing = [b""] * segment.num_rows
    if not segment.files[THUMBNAILS].bytes:
        return nothing, np.ones(segment.num_rows, dtype=np.bool_)
    if table_N3 is None:
        return nothing, np.zeros(segment.num_rows, dtype=np.bool_)
    ends_N = table_N3[:, THUMBNAIL_END]
    starts_N = np.concatenate([[0], ends_N[:-1]])
    file, is_whole_N = _readable(folder, segment, THUMBNAILS, damaged, starts_N, ends_N)
    if file is None:
        return nothing, is_whole_N
    spans = zip(starts_N.tolist(), ends_N.tolist(), is_whole_N.tolist(), strict=True)
    return [bytes(file.data[start:end]) if is_whole else b"" for start, end, is_whole in spans], is_whole_N


def _readable(
    folder: Path, segment: SegmentFacts, name: str, damaged: set[str], starts_N: IntArray, ends_N: IntArray
) -> tuple[MappedFile | None, Mask]:
    """The file, and which rows of it are whole: of a damaged one those outside its damaged blocks."""
    path, facts = folder / segment.name / name, segment.files[name]
    if name not in damaged:
        return MappedFile(path, None), np.ones(len(starts_N), dtype=np.bool_)
    none_N: Mask = np.zeros(len(starts_N), dtype=np.bool_)
    if BLOCKS in damaged or not is_file(path) or path.stat().st_size != facts.bytes:
        return None, none_N
    file = MappedFile(path, block_digests(folder / segment.name, segment).get(name))
    bad = list(file.damaged_blocks())
    if not bad:  # without digests; the digest of the whole file says otherwise
        return None, none_N
    is_whole_N: Mask = ~none_N
    for start, stop in bad:
        is_whole_N &= (ends_N <= start) | (starts_N >= stop)
    return file, is_whole_N


def _lines(path: Path, table_N3: IntArray | None) -> list[bytes]:
    """The lines of an items.jsonl, cut where the table says; without it, at the ends of lines.

    Those are empty that a file lacks which is gone or shorter.
    """
    if table_N3 is None:
        return path.read_bytes().splitlines()
    data, ends = path.read_bytes() if is_file(path) else b"", table_N3[:, ITEM_END].tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def require_removed(folder: Path, facts: Manifest, damaged: Sequence[Damage]) -> None:
    """Raises DataError when the list of removed rows is damaged: no other file says which items are left."""
    if facts.removed is not None and facts.removed.name in [one.path for one in damaged]:
        raise DataError(
            "is damaged, and no other file tells which items were removed; build the index again in another folder",
            at=folder / facts.removed.name,
        )
