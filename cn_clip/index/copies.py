"""Equal and nearly equal pictures of an index, in groups, the best one first; `cn-clip index duplicates` lists them.

Equal are those of the same bytes. Nearly equal are those of which both the vectors and the outlines of the thumbnails
are alike: a resized or recompressed copy, or one cut at its edges by some hundredths. Of photos that only show the
same, the outlines differ.
"""

# N pictures, B of a block, P pairs of them, D dimensions, H bits of a hash

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cn_clip.command import Speaker
from cn_clip.data.pictures import open_picture
from cn_clip.errors import ConfigError, DataError
from cn_clip.language import both, counted
from cn_clip.retrieval.schemes import address_of
from cn_clip.retrieval.segments import IntArray, ItemId
from cn_clip.retrieval.store import Index, open_index
from cn_clip.terminal import shown

if TYPE_CHECKING:
    from cn_clip.index.duplicates import Options

Bits: TypeAlias = NDArray[np.bool_]

# Rows of which all pairs are compared at once: 16 MB of scores.
BLOCK = 2048
# Pairs whose bits are compared at once: 8 MB.
PAIRS = 1 << 16
# Brightness is compared between neighbours on a grid of so many points a side, in both directions.
GRID = 8
# A JPEG is decoded at an eighth of its size, but no smaller than this.
_DRAFT_SIZE = 32
# What decides between two pictures of a group, in this order; in Chinese and in English.
REASONS = {
    "pixels": ("像素最多", "most pixels"),
    "size": ("文件最大", "largest file"),
    "date": ("日期最早", "earliest date"),
    "name": ("名字最短", "shortest name"),
}
_NO_DATE = "9999"


@dataclass(frozen=True)
class Member:
    """A picture of a group. cosine, distance: from the best one, None where it has no thumbnail."""

    id: ItemId
    metadata: dict[str, Any]
    is_equal: bool
    cosine: float
    distance: int | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        told = {name: self.metadata.get(name) for name in ("width", "height", "size", "date")}
        return {"id": self.id, **told, "equal": self.is_equal, "cosine": self.cosine, "distance": self.distance}

    def __str__(self) -> str:
        """One line, without what only compares it."""
        told = self.metadata
        size = f"{told['size'] / 2**20:.2f} MB" if isinstance(told.get("size"), int) else ""
        sides = f"{told['width']} x {told['height']}" if told.get("width") and told.get("height") else ""
        return "  ".join(filter(None, (shown(self.id), sides, size, str(told.get("date") or ""))))


@dataclass(frozen=True)
class Group:
    """Two or more pictures, the best first. reason: of `REASONS`, by which it comes before the second."""

    members: list[Member]
    reason: str


def tell(options: "Options", say: Speaker) -> None:
    """Prints the groups; raises DataError for an index that cannot be read, ConfigError for an address of a server."""
    folder = address_of(options.index)
    if not isinstance(folder, Path):
        raise ConfigError(
            f"the pictures of an index in {folder.store} are not compared; this command is for folders", at=folder
        )
    index = open_index(folder)
    say.note(
        both(f"比较 {len(index)} 张图片：{options.index}", f"comparing {counted(len(index), 'image')}: {options.index}")
    )
    search = Copies(index, options.min_cosine, options.max_distance)
    groups = sorted(search.groups(), key=lambda group: str(group.members[0].id))
    more = [member for group in groups for member in group.members[1:]]
    num_bytes = sum(size for member in more if isinstance(size := member.metadata.get("size"), int))
    for number, group in enumerate(groups, start=1):
        num_members = len(group.members)
        say(f"{number}. " + both(f"{num_members} 张图片", f"{num_members} images"))
        say(f"  * {group.members[0]}  ({both(*REASONS[group.reason])})")
        for member in group.members[1:]:
            bits = (
                ""
                if member.distance is None
                else both(f"，{member.distance} 位不同", f", {member.distance} bits differ")
            )
            near = both(f"相近：{member.cosine:.3f}{bits}", f"similar: {member.cosine:.3f}{bits}")
            how = both("相同", "identical") if member.is_equal else near
            say(f"    {member}  ({how})")
    for count, why in (
        (search.num_bare, both("没有缩略图，只看是否相同", "without a thumbnail, so compared only for identity")),
        (search.num_frames, both("视频的画面，不比较", "frames of videos, not compared")),
    ):
        if count:
            say(both(f"{count} 张：{why}", f"{counted(count, 'image')}: {why}"))
    say(
        both(
            f"{len(groups)} 组，每组最好的一张之外还有 {len(more)} 张，共 {num_bytes / 2**20:.1f} MB；什么也没有删除",
            f"{counted(len(groups), 'group')}, {counted(len(more), 'image')} besides the best of each, "
            f"{num_bytes / 2**20:.1f} MB; nothing was removed",
        )
    )
    say.result(
        {
            "index": options.index,
            "num_items": len(index),
            "min_cosine": options.min_cosine,
            "max_distance": options.max_distance,
            "num_more": len(more),
            "bytes_more": num_bytes,
            "without_thumbnail": search.num_bare,
            "frames": search.num_frames,
            "groups": [
                {"because": group.reason, "items": [member.as_dict() for member in group.members]} for group in groups
            ],
        }
    )


def outline(image: Image.Image) -> Bits:
    """The bits (H,) of a picture: whether it grows brighter to the right, and downwards, at the points of a grid.

    Size, compression and brightness change few of them (dHash, of H. Krawetz).
    """
    grey = image.convert("L")
    wide, high = (
        np.asarray(grey.resize(size, Image.Resampling.LANCZOS), dtype=np.int16)
        for size in ((GRID + 1, GRID), (GRID, GRID + 1))
    )
    return np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (high[1:] > high[:-1]).ravel()])


class Copies:
    """Finds the groups of an index. num_bare: pictures without a thumbnail; num_frames: those of videos, left out."""

    def __init__(self, index: Index, min_cosine: float, max_distance: int) -> None:
        self._index, self._min_cosine, self._max_distance = index, min_cosine, max_distance
        self._rows = index.snapshot.rows
        kinds, self._digests = index.table.values("kind"), index.table.values("digest")
        alive = np.flatnonzero(index.snapshot.alive_N).tolist()
        self._pictures = [row for row in alive if kinds[row] != "video"]
        self.num_frames = len(alive) - len(self._pictures)
        self.num_bare = sum(not self._has_thumbnail(row) for row in self._pictures)
        self._parents = {row: row for row in self._pictures}
        self._bits: dict[int, Bits | None] = {}

    def groups(self) -> Iterator[Group]:
        """All groups, in any order."""
        of_digest: dict[str, int] = {}
        for row in self._pictures:
            if isinstance(digest := self._digests[row], str):
                self._join(of_digest.setdefault(digest, row), row)
        # One of each that are equal is enough.
        rows_N = np.array([row for row in self._pictures if self._parents[row] == row], dtype=np.int64)
        for one_P, other_P in self._pairs(rows_N):
            is_near = self._distances(one_P, other_P) <= self._max_distance
            for one, other in zip(one_P[is_near].tolist(), other_P[is_near].tolist(), strict=True):
                self._join(one, other)
        members = defaultdict[int, list[int]](list)
        for row in self._pictures:
            members[self._root(row)].append(row)
        yield from (self._group(rows) for rows in members.values() if len(rows) > 1)

    def _pairs(self, rows_N: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        """Pairs of rows whose vectors are near, some at a time. Memory: two blocks and their scores."""
        for start in range(0, len(rows_N), BLOCK):
            ones_BD = self._rows.gather(rows_N[start : start + BLOCK])
            for first in range(start, len(rows_N), BLOCK):
                scores_BB = ones_BD @ self._rows.gather(rows_N[first : first + BLOCK]).T
                if first == start:  # each pair once, and none with itself
                    scores_BB[np.tril_indices(len(scores_BB))] = -np.inf
                one_P, other_P = np.nonzero(scores_BB >= self._min_cosine)
                for begin in range(0, len(one_P), PAIRS):
                    part = slice(begin, begin + PAIRS)
                    yield rows_N[start + one_P[part]], rows_N[first + other_P[part]]

    def _distances(self, one_P: IntArray, other_P: IntArray) -> IntArray:
        """Bits (P,) in which the outlines differ; more than there are where a thumbnail is missing."""
        rows, number_2P = np.unique(np.stack([one_P, other_P]), return_inverse=True)
        found = [self._outline(row) for row in rows.tolist()]
        known = np.array([bits is not None for bits in found], dtype=np.bool_)
        bits_NH = np.stack([np.zeros(2 * GRID * GRID, np.bool_) if bits is None else bits for bits in found])
        one, other = number_2P.reshape(2, -1)
        distance_P: IntArray = (bits_NH[one] != bits_NH[other]).sum(axis=1)
        distance_P[~(known[one] & known[other])] = 2 * GRID * GRID + 1
        return distance_P

    def _outline(self, row: int) -> Bits | None:
        """None without a thumbnail, or with a damaged one."""
        if row not in self._bits:
            segment, number = self._rows.segment_of(row)
            small, self._bits[row] = segment.thumbnail(number), None
            with contextlib.suppress(DataError):
                if small:
                    self._bits[row] = outline(open_picture(small, _DRAFT_SIZE))
        return self._bits[row]

    def _has_thumbnail(self, row: int) -> bool:
        segment, number = self._rows.segment_of(row)
        return segment.has_thumbnail(number)

    def _root(self, row: int) -> int:
        while self._parents[row] != row:
            self._parents[row] = row = self._parents[self._parents[row]]
        return row

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self._parents[second] = first

    def _group(self, rows: list[int]) -> Group:
        items = {}
        for row in rows:
            segment, number = self._rows.segment_of(row)
            items[row] = segment.item(number)
        ordered = sorted(rows, key=lambda row: _goodness(*items[row]))
        keys = [_goodness(*items[row]) for row in ordered[:2]]
        reason = next((name for name, one, two in zip(REASONS, *keys, strict=True) if one != two), "name")
        best = ordered[0]
        vectors_ND = self._rows.gather(np.array(ordered))
        cosines = (vectors_ND @ vectors_ND[0]).tolist()
        members = []
        for row, cosine in zip(ordered, cosines, strict=True):
            bits, digest = [self._outline(one) for one in (best, row)], self._digests[row]
            distance = None if bits[0] is None or bits[1] is None else int((bits[0] != bits[1]).sum())
            is_equal = digest is not None and digest == self._digests[best]
            members.append(Member(*items[row], is_equal, round(cosine, 4), distance))
        return Group(members, reason)


def _goodness(item_id: ItemId, metadata: dict[str, Any]) -> tuple[Any, ...]:
    """What sorts the best picture first; see `REASONS`."""
    width, height, size = (
        value if type(value := metadata.get(name)) is int else 0 for name in ("width", "height", "size")
    )
    date, name = metadata.get("date"), str(item_id)
    return -width * height, -size, date if isinstance(date, str) else _NO_DATE, (len(name), name)
