"""Reads every byte of an index and tells what is damaged, and what of a damaged segment can still be read."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.digests import facts_of
from cn_clip.errors import DataError
from cn_clip.retrieval import manifest
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.segments import (
    ITEM_END,
    ITEMS,
    KEY,
    ROWS,
    THUMBNAIL_END,
    THUMBNAILS,
    VECTORS,
    IntArray,
    ItemId,
    Segment,
)
from cn_clip.retrieval.store import Snapshot, removed_keys
from cn_clip.retrieval.writer import NewItem


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file of an index. path: in its folder."""

    path: str
    reason: str

    @property
    def owner(self) -> str:
        """The segment or derived file that suffers."""
        return self.path.split("/")[0]


def inspect(folder: Path, facts: Manifest) -> Iterator[Damage]:
    """All damaged files; what the manifest does not name is no concern."""
    is_whole = True
    for path, expected in facts.files():
        try:
            found = facts_of(folder / path)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        else:
            if found == expected:
                continue
            is_longer = found.bytes != expected.bytes
            reason = f"expected {expected.bytes} bytes, found {found.bytes}" if is_longer else "its bytes have changed"
        is_whole = False
        yield Damage(path, reason)
    if is_whole:
        yield from _contradictions(folder, facts)


def _contradictions(folder: Path, facts: Manifest) -> Iterator[Damage]:
    """What no crash can cause, only a fault of a program."""
    snapshot = Snapshot.open(folder, facts)
    ids = [item_id for _, item_id, _ in snapshot.items()]
    if len(set(ids)) < len(ids):
        yield Damage(manifest.NAME, f"{len(ids) - len(set(ids))} ids come twice")
    for segment in snapshot.rows.segments:
        if not np.isfinite(segment.vectors_ND).all():
            yield Damage(f"{segment.folder.name}/{VECTORS}", "holds NaN or infinity")


@dataclass(frozen=True)
class Remains:
    """The items of a damaged segment that its other files still tell of.

    has_vectors, has_thumbnails: theirs are whole; without, the items have zeros, or no thumbnail.
    """

    items: list[NewItem]
    num_lost: int
    has_vectors: bool
    has_thumbnails: bool


def remains(folder: Path, facts: Manifest, name: str, damaged: set[str]) -> Remains:
    """What can be read of the segment `name`. damaged: its damaged files; num_lost: items without a name.

    Without rows.npy nobody knows which rows were removed; where any were, and where items.jsonl is damaged too, all of
    the segment is lost. Of a damaged items.jsonl the lines count that parse and whose id is that of their path.
    """
    segment = next(one for one in facts.segments if one.name == name)
    table_N3 = None if ROWS in damaged else np.load(folder / name / ROWS, allow_pickle=False)
    removed = removed_keys(folder, facts)
    if table_N3 is None and (ITEMS in damaged or len(removed)):
        return Remains([], segment.num_rows, has_vectors=False, has_thumbnails=False)
    alive = np.arange(segment.num_rows) if table_N3 is None else np.flatnonzero(~np.isin(table_N3[:, KEY], removed))
    width = facts.model.embed_dim
    vectors = np.zeros((segment.num_rows, width), dtype=np.float32)
    if VECTORS not in damaged:
        vectors = np.load(folder / name / VECTORS, mmap_mode="r", allow_pickle=False)
    lines = _lines(folder / name / ITEMS, table_N3)
    thumbnails = None
    if table_N3 is not None and THUMBNAILS not in damaged:
        thumbnails = _cut(folder / name / THUMBNAILS, table_N3[:, THUMBNAIL_END])
    found: dict[ItemId, NewItem] = {}
    for row in alive.tolist():
        try:
            item_id, metadata = Segment.parse(lines[row], f"{folder / name / ITEMS}:{row + 1}")
        except DataError:
            continue
        if ITEMS not in damaged or _is_likely(item_id, metadata):
            found[item_id] = NewItem(item_id, vectors[row], metadata, thumbnails[row] if thumbnails else b"")
    had_thumbnails = segment.files[THUMBNAILS].bytes > 0
    return Remains(
        list(found.values()),
        len(alive) - len(found),
        has_vectors=VECTORS not in damaged,
        has_thumbnails=thumbnails is not None or not had_thumbnails,
    )


def _lines(path: Path, table_N3: IntArray | None) -> list[bytes]:
    """The lines of an items.jsonl, cut where the table says; without it, at the ends of lines."""
    return path.read_bytes().splitlines() if table_N3 is None else _cut(path, table_N3[:, ITEM_END])


def _cut(path: Path, ends_N: IntArray) -> list[bytes]:
    """The pieces of a file, each up to its end; empty where the file is gone or shorter."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    ends = ends_N.tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _is_likely(item_id: ItemId, metadata: Mapping[str, Any]) -> bool:
    """Whether an id of a damaged file is that of its picture's path, where it has one."""
    path, source = metadata.get("path"), metadata.get("source")
    if not isinstance(path, str) or not isinstance(source, str):
        return True
    return str(item_id).endswith(os.path.relpath(path, source).replace(os.sep, "/"))


def require_removed(folder: Path, facts: Manifest) -> None:
    """Raises DataError when the list of removed rows is damaged: then nobody knows which items there are."""
    if facts.removed is None:
        return
    try:
        is_whole = facts_of(folder / facts.removed.name) == facts.removed.file
    except OSError:
        is_whole = False
    if not is_whole:
        raise DataError(
            f"{folder / facts.removed.name}: is damaged, and no other file tells which items were removed; build the "
            "index again in another folder"
        )
