"""An index on disk, opened for searching: vectors with ids, metadata and thumbnails. `writer` makes and changes it.

from cn_clip.retrieval.store import open_index
index = open_index("photos.index")
hits = index.search(vectors_QD, 10, where="group=动物")[0]
"""

# Q queries, N rows of all segments, removed ones included, D dimensions

import io
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval import listing, manifest
from cn_clip.retrieval.conditions import parse_condition
from cn_clip.retrieval.engine_table import ENGINES
from cn_clip.retrieval.engines import Engine, ExactEngine, Mask, Rows
from cn_clip.retrieval.graph import WITHOUT_GRAPH
from cn_clip.retrieval.ids import positions_of
from cn_clip.retrieval.listing import Order, Page
from cn_clip.retrieval.manifest import Manifest, ModelInfo, PictureFacts
from cn_clip.retrieval.query import ItemTable
from cn_clip.retrieval.scanning import exact_scores
from cn_clip.retrieval.segments import FloatArray, IntArray, ItemId, Segment
from cn_clip.retrieval.words import DEPTH, WORD_FIELDS, WordTable, fused

__all__ = ["Hit", "Index", "ItemId", "ModelInfo", "open_index"]

logger = logging.getLogger(__name__)

_MASKS_KEPT = 8


class Hit(NamedTuple):
    """A found item. score: the inner product with the query, a cosine for unit vectors."""

    id: ItemId
    score: float
    metadata: dict[str, Any]


def open_index(path: str | os.PathLike[str]) -> "Index":
    """The index of a folder as it is now; a writer that goes on meanwhile does not change what was opened.

    Raises DataError when there is no index, or naming the file that is missing or not as long as it was written.
    """
    folder = Path(path)
    while True:
        facts = manifest.read(folder)
        try:
            return Index(Snapshot.open(folder, facts))
        except DataError:
            if not was_replaced(folder, facts):
                raise


def was_replaced(folder: Path, facts: Manifest) -> bool:
    """Whether a writer has taken away files of a generation: if they cannot be read then, it is not damage."""
    return not facts.names() <= manifest.read(folder).names()


@dataclass(frozen=True)
class Snapshot:
    """One generation of an index: its rows, and which of them are not removed."""

    folder: Path
    manifest: Manifest
    rows: Rows
    alive_N: Mask

    @classmethod
    def open(cls, folder: Path, facts: Manifest) -> "Snapshot":
        """Raises DataError as `open_index`."""
        rows = open_rows(folder, facts)
        alive_N = alive(rows, removed_keys(folder, facts))
        if int(alive_N.sum()) != facts.num_items:
            raise DataError(
                f"holds {int(alive_N.sum())} items, its manifest says {facts.num_items}; {manifest.ADVICE}", at=folder
            )
        return cls(folder, facts, rows, alive_N)

    def items(self) -> Iterator[tuple[int, ItemId, dict[str, Any]]]:
        """(position, id, metadata) of the items, in order of insertion."""
        for segment, start in zip(self.rows.segments, self.rows.starts, strict=False):
            alive_N = self.alive_N[start : start + len(segment)]
            if alive_N.all():
                for row, (item_id, metadata) in enumerate(segment.items(0, len(segment)), start=start):
                    yield row, item_id, metadata
            else:
                for row in np.flatnonzero(alive_N).tolist():
                    yield (start + row, *segment.item(row))

    def positions_of(self, ids: Sequence[ItemId]) -> dict[ItemId, int]:
        """The position of each of the ids that an item has; raises DataError for a damaged item."""
        return positions_of(self.rows, self.alive_N, ids)


def open_rows(folder: Path, facts: Manifest) -> Rows:
    """The rows of all segments; raises DataError as `Segment`."""
    return Rows([Segment(folder / one.name, one, facts.model.embed_dim, facts.vector_type) for one in facts.segments])


def alive(rows: Rows, removed: IntArray) -> Mask:
    """Which rows (N,) are no removed ones; removed: keys, as `removed_keys` gives them."""
    alive_N: Mask = np.ones(len(rows), dtype=np.bool_)
    alive_N[rows.positions_of(removed)] = False
    return alive_N


def removed_keys(folder: Path, facts: Manifest) -> IntArray:
    """The keys of the removed rows; raises DataError when their file is not as it was written."""
    if facts.removed is None:
        return np.empty(0, dtype=np.int64)
    path = folder / facts.removed.name
    data = manifest.read_whole(path, facts.removed.file)
    try:
        keys: IntArray = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, which raises errors of many types
        raise DataError(f"cannot be read ({error}); {manifest.ADVICE}", at=path) from error
    return keys


class Told(Protocol):
    """What an index says of itself, wherever it is kept: `Manifest`, or the facts of one on a server."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def pictures(self) -> PictureFacts | None: ...
    @property
    def source(self) -> str: ...


class Described:
    """What an open index says of itself."""

    told: Told

    @property
    def model(self) -> ModelInfo:
        """The model of the vectors: name, fingerprint, embed_dim."""
        return self.told.model

    @property
    def pictures(self) -> PictureFacts | None:
        """How the pictures of the vectors were seen; None where it is not recorded."""
        return self.told.pictures

    @property
    def source(self) -> str:
        """What it was built from."""
        return self.told.source


class Index(Described):
    """Items with their vectors. Several threads may search one index at once."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Raises DataError when a writer has taken away the graph since."""
        self.snapshot = snapshot
        self.folder = snapshot.folder
        self.told = self.manifest = snapshot.manifest
        # Now, for the next writer removes the graph of this generation.
        self.engine = _open_engine(snapshot)
        self._table: ItemTable | None = None
        self._word_table: WordTable | None = None
        self._masks: dict[str, Mask] = {}
        self._lock, self._ordering = threading.Lock(), threading.Lock()
        self._orders: dict[Order, IntArray] = {}

    @property
    def address(self) -> str:
        """Where the index is."""
        return str(self.folder)

    @property
    def generation(self) -> int:
        """Rises with every change of the index on disk; that of the folder may be ahead."""
        return self.manifest.generation

    def prepare(self) -> None:
        """Makes now what the first look-up of an id would wait for."""
        _ = self.table

    def __len__(self) -> int:
        return self.manifest.num_items

    def __contains__(self, item_id: object) -> bool:
        return type(item_id) in (int, str) and bool(self.snapshot.positions_of([item_id]))  # type: ignore[list-item]

    @property
    def ids(self) -> list[ItemId]:
        """All ids, in order of insertion."""
        return self.table.ids

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        for _, item_id, metadata in self.snapshot.items():
            yield item_id, metadata

    def vector_blocks(self, size: int) -> Iterator[tuple[list[ItemId], list[dict[str, Any]], FloatArray]]:
        """(ids, metadata, vectors (B, D) float32) of the items in order of insertion, so many at a time."""
        items = self.snapshot.items()
        while rows := list(itertools.islice(items, size)):
            positions, ids, known = zip(*rows, strict=True)
            yield list(ids), list(known), self.snapshot.rows.gather(np.array(positions))

    def search(
        self,
        vectors_QD: FloatArray,
        k: int,
        *,
        where: str | None = None,
        min_score: float | None = None,
        offset: int = 0,
        words: str | None = None,
    ) -> list[list[Hit]]:
        """The up to k best items of each query, best first, equal scores in order of insertion.

        vectors_QD: finite float32. where: a condition, see `conditions.parse_condition`. min_score: least score.
        offset: so many of the best are left out. words: of the one query; items that hold them come in by their rank
        among those, too, see `words.fused`; scores stay what they are.
        Raises ConfigError for k below 1 or no integer, a min_score of NaN, a faulty condition or one on a field that
        no item has, DataError for vectors of another shape or type.
        """
        check_bounds(k, min_score, offset)
        queries_QD = checked_queries(vectors_QD, self.model.embed_dim, self.address)
        if words is not None and len(queries_QD) != 1:
            raise ConfigError(f"words: expected one query, got {len(queries_QD)}")
        allowed_N = self._allowed(where)
        if not allowed_N.any():
            return [[] for _ in queries_QD]
        results = []
        depth = k + offset if words is None else max(k + offset, DEPTH)
        for number, (positions, scores) in enumerate(self.engine.search(queries_QD, depth, allowed_N)):
            if words is not None:
                positions, scores = self._with_words(queries_QD[number], positions, scores, words, allowed_N)
                least = -math.inf if min_score is None else min_score
                positions, scores = positions[scores >= least][: k + offset], scores[scores >= least][: k + offset]
            results.append(list[Hit]())
            for position, score in zip(positions[offset:].tolist(), scores[offset:].tolist(), strict=True):
                if min_score is not None and score < min_score:
                    break
                segment, row = self.snapshot.rows.segment_of(position)
                item_id, metadata = segment.item(row)
                results[-1].append(Hit(item_id, score, metadata))
        return results

    def _with_words(
        self, query_D: FloatArray, positions: IntArray, scores: FloatArray, words: str, allowed_N: Mask
    ) -> tuple[IntArray, FloatArray]:
        """The ranking by vector, and that by words, as one; beyond `DEPTH`, the rest of that by vector."""
        holding = self._words().search(words, allowed_N, DEPTH)
        order = fused([positions[:DEPTH].tolist(), holding.tolist()])
        order += [row for row in positions[DEPTH:].tolist() if row not in set(order)]
        known = dict(zip(positions.tolist(), scores.tolist(), strict=True))
        others = np.array([row for row in order if row not in known], dtype=np.int64)
        if len(others):
            cosines = exact_scores(query_D, self.snapshot.rows.gather(others))
            known |= dict(zip(others.tolist(), cosines.tolist(), strict=True))
        return np.array(order, dtype=np.int64), np.array([known[row] for row in order], dtype=np.float32)

    def _words(self) -> WordTable:
        if self._word_table is None:
            columns = [self.table.values(field) for field in WORD_FIELDS]
            with self._lock:
                if self._word_table is None:
                    texts = (" ".join(one for one in row if isinstance(one, str)) for row in zip(*columns, strict=True))
                    self._word_table = WordTable((row, text) for row, text in enumerate(texts) if text)
        return self._word_table

    @property
    def has_words(self) -> bool:
        """Whether the words in the pictures were read."""
        return self.pictures is not None and self.pictures.ocr

    def listed(self, order: Order, limit: int, *, offset: int = 0, where: str | None = None) -> Page:
        """How many items a condition admits, and up to `limit` of them in that order, `offset` of them left out.

        Raises ConfigError as `search`.
        """
        check_bounds(limit, None, offset)
        allowed_N = self._allowed(where)
        with self._ordering:
            ordered = self._orders.get(order)
            if ordered is None:
                ordered = self._orders[order] = self._ordered(order)
        chosen = ordered[allowed_N[ordered]]
        found = (self.snapshot.rows.segment_of(position) for position in chosen[offset : offset + limit].tolist())
        return len(chosen), [segment.item(row) for segment, row in found]

    def _ordered(self, order: Order) -> IntArray:
        if order == "typical":
            return listing.typical(self.snapshot.rows, self.snapshot.alive_N)
        return listing.newest(self.table.values("date"), self.table.values("mtime_ns"), self.snapshot.alive_N)

    def _allowed(self, where: str | None) -> Mask:
        """Which rows (N,) are there, and admitted by a condition."""
        if where is None:
            return self.snapshot.alive_N
        condition = parse_condition(where)
        mask_N = self._masks.get(where)
        if mask_N is None:
            mask_N = self.table.mask(condition)
            with self._lock:
                self._masks[where] = mask_N
                while len(self._masks) > _MASKS_KEPT:
                    del self._masks[next(iter(self._masks))]
        return mask_N

    @property
    def orders(self) -> Sequence[Order]:
        """What `listed` knows."""
        return listing.ORDERS

    @property
    def fields(self) -> list[str]:
        """The fields that any item has."""
        return self.table.fields

    @property
    def has_thumbnails(self) -> bool:
        """Whether any item has one."""
        return any(segment.has_thumbnails for segment in self.snapshot.rows.segments)

    def vector(self, item_id: ItemId) -> FloatArray:
        """The vector (D,) of an item, float32; raises DataError for an unknown id."""
        vector_D: FloatArray = self.snapshot.rows.gather(np.array([self._position(item_id)]))[0]
        return vector_D

    def metadata(self, item_id: ItemId) -> dict[str, Any]:
        """What is known of an item; raises DataError for an unknown id."""
        segment, row = self.snapshot.rows.segment_of(self._position(item_id))
        return segment.item(row)[1]

    def thumbnail(self, item_id: ItemId) -> bytes | None:
        """A small JPEG; None for an unknown id, or an item without a picture."""
        return self.thumbnails([item_id]).get(item_id)

    def thumbnails(self, ids: Iterable[ItemId]) -> dict[ItemId, bytes]:
        """The small JPEGs of those of the items that have one."""
        return {one: small for one, (segment, row) in self._rows_of(ids) if (small := segment.thumbnail(row))}

    def with_thumbnail(self, ids: Iterable[ItemId]) -> set[ItemId]:
        """Those of the ids whose items have a thumbnail."""
        return {one for one, (segment, row) in self._rows_of(ids) if segment.has_thumbnail(row)}

    @property
    def table(self) -> ItemTable:
        """Ids and metadata by column."""
        if self._table is None:
            with self._lock:
                self._table = self._table or ItemTable(self.snapshot.rows.segments, self.snapshot.alive_N)
        return self._table

    def _rows_of(self, ids: Iterable[ItemId]) -> Iterator[tuple[ItemId, tuple[Segment, int]]]:
        """(id, (segment, row in it)) of those that there are, in their order."""
        wanted = list(dict.fromkeys(ids))
        positions = self.snapshot.positions_of(wanted)
        for one in wanted:
            if one in positions:
                yield one, self.snapshot.rows.segment_of(positions[one])

    def _position(self, item_id: ItemId) -> int:
        position = self.snapshot.positions_of([item_id]).get(item_id)
        if position is None:
            raise DataError(f"has no item {item_id!r}", at=self.folder)
        return position


def _open_engine(snapshot: Snapshot) -> Engine:
    """The engine of the index, or the exact one where a file of its own is not whole."""
    facts = snapshot.manifest
    try:
        return ENGINES[facts.engine].load(snapshot.folder, facts, snapshot.rows)
    except DataError as error:
        if was_replaced(snapshot.folder, facts):
            raise
        logger.warning("%s; %s", str(error).removesuffix(f"; {manifest.ADVICE}"), WITHOUT_GRAPH)
        return ExactEngine(snapshot.rows)


def check_bounds(k: int, min_score: float | None, offset: int = 0) -> None:
    """Raises ConfigError for what bounds no search."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ConfigError(f"k: expected an integer, at least 1, got {k!r}")
    if min_score is not None and math.isnan(min_score):
        raise ConfigError("min_score: expected a number, got nan")
    if offset < 0:
        raise ConfigError(f"offset: expected an integer, at least 0, got {offset}")


def checked_queries(vectors_QD: FloatArray, embed_dim: int, address: str) -> FloatArray:
    """The queries as they are; raises DataError, naming the index, for another shape or type or what is not finite."""
    expected = f"{address}: expected float32 queries of the shape (Q, {embed_dim})"
    if vectors_QD.ndim != 2 or vectors_QD.shape[1] != embed_dim or vectors_QD.dtype != np.float32:
        raise DataError(f"{expected}, got {vectors_QD.dtype} {vectors_QD.shape}")
    if not np.isfinite(vectors_QD).all():
        raise DataError(f"{expected}, all finite; some hold NaN or infinity")
    return vectors_QD


def same_model(found: ModelInfo, given: ModelInfo, address: object) -> None:
    """Raises ConfigError naming both models when vectors of the one cannot be compared with those of the other."""
    if not found.fingerprint:
        raise ConfigError(
            "the index does not record its model; build it again with `cn-clip index build --model`, or "
            "search it with `cn-clip search --id`",
            at=address,
        )
    if found.fingerprint != given.fingerprint:
        raise ConfigError(
            f"its vectors are of the model {found.name} ({found.fingerprint}), not of {given.name} "
            f"({given.fingerprint}); give --model {found.name}, or build another index",
            at=address,
        )
