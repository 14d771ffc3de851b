"""An index whose rows a server keeps: it finds the same items in the same order as a folder; see `addresses`.

What the server finds is scored and judged again here, so that all stores answer alike; see `remote_rows`.
"""

# Q queries, D dimensions

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval.conditions import ID_FIELDS, Condition, fields_of, parse_condition
from cn_clip.retrieval.graph import OVERFETCH
from cn_clip.retrieval.ids import integers
from cn_clip.retrieval.listing import Order, Page
from cn_clip.retrieval.manifest import EngineName, Manifest, PictureFacts
from cn_clip.retrieval.remote_rows import (
    WINDOW,
    Facts,
    Fields,
    Filter,
    NewRow,
    Rows,
    TooLargeError,
    key_of,
    require,
)
from cn_clip.retrieval.scanning import exact_scores
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.store import Described, Hit, check_bounds, checked_queries
from cn_clip.retrieval.writer import NewItem, checked_lines

# Rows with their vectors in one answer: some 10 MB.
LARGEST_LIMIT = 4096
# Of items that a writer keeps, since a copy of a picture soon asks for what was written or read a moment ago.
KEPT_BYTES = 64 << 20


class _Row(NamedTuple):
    """A row with its score. position: rises in order of insertion."""

    score: float
    position: int
    id: ItemId
    metadata: dict[str, Any]


class RemoteIndex(Described):
    """Items with their vectors, as they are on the server at every call. Several threads may search at once."""

    def __init__(self, rows: Rows) -> None:
        """Raises DataError when there is no such index, StoreError when no server answers."""
        self._rows = rows
        self.told = require(rows, with_count=False)
        self._seen_fields = set[str]()

    @property
    def address(self) -> str:
        """Where the index is."""
        return str(self._rows.address)

    @property
    def opened_at(self) -> IndexAddress:
        """Where the index is, with all that opens it again."""
        return self._rows.address

    def ping(self) -> None:
        """Asks for as little as shows that the server answers; raises AwayError, StoreError."""
        self._rows.ping()

    def prepare(self) -> None:
        """Looks at what fields the first items have."""
        for _, metadata in itertools.islice(self.items(), WINDOW):
            self._seen_fields.update(metadata)

    def __len__(self) -> int:
        return self._rows.count()

    def __contains__(self, item_id: object) -> bool:
        return type(item_id) in (int, str) and bool(self._fields(item_id, "key"))  # type: ignore[arg-type]

    @property
    def ids(self) -> list[ItemId]:
        """All ids, in order of insertion."""
        return [item_id for item_id, _ in self.items()]

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        for row in self._rows.scan(["item"]):
            yield _parsed(row, self.address)

    def vector_blocks(self, size: int) -> Iterator[tuple[list[ItemId], list[dict[str, Any]], FloatArray]]:
        """(ids, metadata, vectors (B, D) float32) of the items in order of insertion, so many at a time."""
        found = self._rows.scan(["item", "vector"])
        while rows := list(itertools.islice(found, size)):
            ids, known = zip(*(_parsed(row, self.address) for row in rows), strict=True)
            yield list(ids), list(known), np.array([row["vector"] for row in rows], dtype=np.float32)

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
        """As `store.Index.search`; raises StoreError besides, and ConfigError for words."""
        if words is not None:
            raise ConfigError(f"words: an index in {self._rows.name} is searched by vectors alone; leave them out")
        check_bounds(k, min_score, offset)
        k += offset
        queries_QD = checked_queries(vectors_QD, self.model.embed_dim, self.address)
        condition = parse_condition(where) if where is not None else None
        # Without a condition all that is found fits, and only rows of equal scores are needed besides.
        wanted = k if condition is None else OVERFETCH * k
        limit = min(int(wanted) + 16, LARGEST_LIMIT)
        found = self._found(queries_QD, k, condition, limit)
        if condition is not None:
            _check_fields(self._rows, condition, self._seen_fields)
        results = list[list[Hit]]()
        for best in found:
            hits = [Hit(row.id, row.score, row.metadata) for row in best[offset:]]
            results.append([hit for hit in hits if min_score is None or hit.score >= min_score])
        return results

    def _found(self, queries_QD: FloatArray, k: int, condition: Condition | None, limit: int) -> list[list[_Row]]:
        """The k best of each query that fit."""
        asked = self._rows.filter_of(condition) if condition is not None else None
        few = self._few(asked, limit) if asked is not None else None
        if few is not None:
            for row in few:
                self._seen_fields.update(_parsed(row, self.address)[1])
            return [
                _first((row for row in self._scored(query_D, few) if _fits(row, condition)), k)
                for query_D in queries_QD
            ]
        at_once, results = max(1, LARGEST_LIMIT // limit), list[list[_Row]]()
        for start in range(0, len(queries_QD), at_once):
            part_QD = queries_QD[start : start + at_once]
            for query_D, rows in zip(part_QD, self._nearest(part_QD, limit, asked), strict=True):
                results.append(self._best(query_D, k, condition, rows, limit, asked))
        return results

    def _few(self, asked: Filter, limit: int) -> list[Fields] | None:
        """All rows that a filter admits, with their vectors; None where these are `limit` or more."""
        try:
            rows = self._rows.query(asked, ["place", "item", "vector"], limit=limit)
        except TooLargeError:
            return None
        return rows if len(rows) < limit else None

    def listed(self, order: Order, limit: int, *, offset: int = 0, where: str | None = None) -> Page:
        """As `store.Index.listed`; raises ConfigError, for a server orders nothing without a query."""
        raise ConfigError(f"order: an index in {self._rows.name} has no order {order!r}; search it")

    @property
    def orders(self) -> Sequence[Order]:
        """What `listed` knows."""
        return ()

    @property
    def fields(self) -> list[str]:
        """The fields that were seen: of the first items, and all once a condition on another one was asked for."""
        return sorted(self._seen_fields)

    @property
    def has_words(self) -> bool:
        """Whether it is searched by words."""
        return False

    @property
    def has_thumbnails(self) -> bool:
        """Whether any item has one."""
        return self._rows.has_thumbnails()

    def vector(self, item_id: ItemId) -> FloatArray:
        """The vector (D,) of an item, float32; raises DataError for an unknown id."""
        return np.asarray(self._known(item_id, "vector")["vector"], dtype=np.float32)

    def metadata(self, item_id: ItemId) -> dict[str, Any]:
        """What is known of an item; raises DataError for an unknown id."""
        return _parsed(self._known(item_id, "item"), self.address)[1]

    def thumbnail(self, item_id: ItemId) -> bytes | None:
        """A small JPEG; None for an unknown id, or an item without a picture."""
        return self.thumbnails([item_id]).get(item_id)

    def thumbnails(self, ids: Iterable[ItemId]) -> dict[ItemId, bytes]:
        """The small JPEGs of those of the items that have one."""
        of_key = {key_of(one): one for one in ids}
        rows = self._rows.of_keys(list(of_key), ["key", "thumbnail"])
        return {of_key[row["key"]]: row["thumbnail"] for row in rows if row["thumbnail"]}

    def with_thumbnail(self, ids: Iterable[ItemId]) -> set[ItemId]:
        """Those of the ids whose items have a thumbnail."""
        of_key = {key_of(one): one for one in ids}
        return {of_key[key] for key in self._rows.with_thumbnail(list(of_key))}

    def _fields(self, item_id: ItemId, *fields: str) -> list[Fields]:
        return list(self._rows.of_keys([key_of(item_id)], fields))

    def _known(self, item_id: ItemId, *fields: str) -> Fields:
        found = self._fields(item_id, *fields)
        if not found:
            raise DataError(f"has no item {item_id!r}", at=self.address)
        return found[0]

    def _nearest(self, queries_QD: FloatArray, limit: int, asked: Filter) -> list[list[_Row]]:
        """What the server finds for each query, of what its own condition admits, with exact scores."""
        names = ["place", "item", "vector"]
        try:
            found = self._rows.nearest(queries_QD, limit, names, asked)
        except TooLargeError:  # which items first, then as many at once as an answer holds
            near = self._rows.nearest(queries_QD, limit, ["key"], asked)
            keys = list(dict.fromkeys(row["key"] for rows in near for row in rows))
            known = {row["key"]: row for row in self._rows.of_keys(keys, ["key", *names])}
            found = [[known[row["key"]] for row in rows if row["key"] in known] for rows in near]
        return [self._scored(query_D, rows) for query_D, rows in zip(queries_QD, found, strict=True)]

    def _scored(self, query_D: FloatArray, rows: Sequence[Mapping[str, Any]]) -> list[_Row]:
        vectors = np.array([row["vector"] for row in rows], dtype=np.float64).reshape(len(rows), len(query_D))
        scores = exact_scores(query_D, vectors).tolist()
        return [
            _Row(score, int(row["place"]), *_parsed(row, self.address)) for score, row in zip(scores, rows, strict=True)
        ]

    def _best(
        self, query_D: FloatArray, k: int, condition: Condition | None, rows: list[_Row], limit: int, asked: Filter
    ) -> list[_Row]:
        """The k best that fit: of `rows`, or, where these are too few, of more and at last of all.

        asked: the server's own condition, which `rows` and all others that fit meet.
        """
        while True:
            fitting = [row for row in rows if _fits(row, condition)]
            best, is_all = _first(fitting, k), len(rows) < limit and len(rows) >= self._rows.count(asked)
            # Others may score like the last of the candidates, and come first.
            if is_all or (len(best) == k and best[-1].score > min(row.score for row in rows)):
                return best
            if len(rows) < limit or limit == LARGEST_LIMIT:
                break
            limit = min(8 * limit, LARGEST_LIMIT)
            rows = self._nearest(query_D[None], limit, asked)[0]
        keys = [
            row["key"]
            for row in self._rows.scan(["key", "item"], asked)
            if condition is None or condition.admits(*_parsed(row, self.address))
        ]
        best = []
        for start in range(0, len(keys), LARGEST_LIMIT):
            found = self._rows.of_keys(keys[start : start + LARGEST_LIMIT], ["place", "item", "vector"])
            best = _first([*best, *self._scored(query_D, list(found))], k)
        return best


def _fits(row: _Row, condition: Condition | None) -> bool:
    return condition is None or condition.admits(row.id, row.metadata)


def _first(rows: Iterable[_Row], k: int) -> list[_Row]:
    return sorted(rows, key=lambda row: (-row.score, row.position))[:k]


def _parsed(row: Mapping[str, Any], where: str) -> tuple[ItemId, dict[str, Any]]:
    try:
        values = json.loads(row["item"])
        return values["id"], values["metadata"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the item at {row.get('place')} is damaged ({error}); build it again", at=where) from error


def _check_fields(rows: Rows, condition: Condition, seen: set[str]) -> None:
    """Raises ConfigError for a field that no item has. seen: fields that items have, to which it adds others."""

    def note(some: Iterable[Fields]) -> None:
        for row in some:
            seen.update(_parsed(row, str(rows.address))[1])

    for field in condition.fields - seen - set(ID_FIELDS):
        note(rows.with_field(field))
    unknown = condition.fields - seen - set(ID_FIELDS)
    if not unknown:
        return
    if not rows.is_sure_of_fields():
        for row in rows.scan(["item"]):  # until each field was seen, now or by a condition before
            note([row])
            if unknown <= seen:
                return
    elif not seen:
        note(itertools.islice(rows.scan(["item"]), WINDOW))
    condition.check_fields(seen | set(ID_FIELDS) if rows.count() else ())


@contextlib.contextmanager
def open_remote_writer(rows: Rows, create: Manifest | None = None) -> "Iterator[RemoteWriter]":
    """Changes an index; create: model, source and pictures of one that is not there yet.

    Raises DataError when there is none and `create` is None, StoreError when no server answers.
    """
    with rows.alone():
        if create is not None and rows.facts(with_count=False) is None:
            rows.create(create.model, create.source, create.pictures)
        yield RemoteWriter(rows, require(rows, with_count=False))


class RemoteWriter:
    """Adds and removes items, which count at once.

    It asks for the rows that a change is about, so that this costs the same in an index of any size. Whoever goes
    through `items` has all metadata kept in memory from then on.
    """

    def __init__(self, rows: Rows, facts: Facts) -> None:
        self._rows, self._facts = rows, facts
        # All items, once they were asked for; how many there are; the position of the next one.
        self._items: dict[ItemId, dict[str, Any]] | None = None
        self._count: int | None = None
        self._next_position: int | None = None
        self._kept: dict[ItemId, NewItem] = {}
        self._kept_bytes = self._num_written = 0

    @property
    def largest_thumbnail(self) -> int | None:
        """Bytes."""
        return self._rows.largest_thumbnail

    @property
    def manifest(self) -> Facts:
        """What the index says of itself, but how many items it has."""
        return self._facts

    def __len__(self) -> int:
        if self._items is not None:
            return len(self._items)
        if self._count is None:
            self._count = self._rows.count()
        return self._count

    def __contains__(self, item_id: object) -> bool:
        return type(item_id) in (int, str) and bool(self.known([item_id]))  # type: ignore[list-item]

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        if self._items is None:
            self._items = dict(_parsed(row, str(self._rows.address)) for row in self._rows.scan(["item"]))
        yield from list(self._items.items())

    def known(self, ids: Iterable[ItemId]) -> dict[ItemId, dict[str, Any]]:
        """As `IndexWriter.known`."""
        wanted = list(dict.fromkeys(ids))
        if self._items is not None:
            return {one: self._items[one] for one in wanted if one in self._items}
        rows = self._rows.of_keys([key_of(one) for one in wanted], ["item"])
        found = dict(_parsed(row, str(self._rows.address)) for row in rows)
        return {one: found[one] for one in wanted if one in found}

    def called(self, names: Sequence[str]) -> dict[str, ItemId]:
        """As `IndexWriter.called`."""
        of_name: dict[str, list[ItemId]] = {name: [name, *integers(name)] for name in names}
        of_key = {key_of(one): one for ids in of_name.values() for one in ids}
        positions = {of_key[row["key"]]: row["place"] for row in self._rows.of_keys(list(of_key), ["key", "place"])}
        found = {name: [one for one in ids if one in positions] for name, ids in of_name.items()}
        return {name: max(ids, key=positions.__getitem__) for name, ids in found.items() if ids}

    def fitting(self, condition: Condition) -> list[ItemId]:
        """As `IndexWriter.fitting`."""
        rows = self._rows.scan(["item"], self._rows.filter_of(condition))
        items = [_parsed(row, str(self._rows.address)) for row in rows]
        _check_fields(self._rows, condition, {field for item in items for field in fields_of(*item)})
        return [item_id for item_id, metadata in items if condition.admits(item_id, metadata)]

    def stored(self, ids: Iterable[ItemId], *, soon: Iterable[ItemId] = ()) -> dict[ItemId, NewItem]:
        """Those of the items that the index has, as they would be added again.

        soon: others that may be asked for next; one request reads them too.
        """
        wanted = [one for one in dict.fromkeys(ids) if self._items is None or one in self._items]
        found = {one: self._kept[one] for one in wanted if one in self._kept}
        if len(found) < len(wanted):
            more = [one for one in soon if (self._items is None or one in self._items) and one not in self._kept]
            keys = list(dict.fromkeys(key_of(one) for one in (*more, *wanted) if one not in found))
            for row in self._rows.of_keys(keys, ["item", "vector", "thumbnail"]):
                item_id, metadata = _parsed(row, str(self._rows.address))
                item = NewItem(item_id, np.asarray(row["vector"], dtype=np.float32), metadata, row["thumbnail"])
                found[item_id] = item
                self._keep(item)
        return {one: found[one] for one in wanted if one in found}

    def _keep(self, item: NewItem) -> None:
        self._forget(item.id)
        self._kept[item.id] = item
        self._kept_bytes += _bytes_of(item)
        while self._kept_bytes > KEPT_BYTES:
            self._forget(next(iter(self._kept)))

    def _forget(self, item_id: ItemId) -> None:
        item = self._kept.pop(item_id, None)
        if item is not None:
            self._kept_bytes -= _bytes_of(item)

    def describe(self, *, engine: EngineName | None, source: str, pictures: PictureFacts | None = None) -> None:
        """Notes the source, and how pictures were seen if given; raises ConfigError for an engine: it has its own."""
        if engine is not None:
            raise ConfigError(f"{self._rows.name} searches by itself; leave --engine out", at=self._rows.address)
        pictures = pictures or self._facts.pictures
        if (source, pictures) != (self._facts.source, self._facts.pictures):
            self._rows.describe(source, pictures)
            self._facts = replace(self._facts, source=source, pictures=pictures)

    def notes(self) -> bytes:
        """As `IndexWriter.notes`."""
        return self._rows.notes()

    def commit(
        self, items: Sequence[NewItem] = (), remove: Iterable[ItemId] = (), *, notes: bytes | None = None
    ) -> None:
        """Adds items, which replace those of the same id, and removes others; ids that are not there are passed over.

        When it returns, every reader sees the change. A run that is killed meanwhile leaves every item once, the old
        or the new. Raises DataError, with nothing changed, for what `writer.IndexWriter.commit` refuses and for more
        metadata or larger thumbnails than the server holds. notes: count once the items do.
        """
        lines, remove = checked_lines(items, self._facts.model.embed_dim, "float32"), list(dict.fromkeys(remove))
        if items and self._next_position is None:
            self._next_position = self._rows.next_place()
        first = self._next_position or 0
        rows = [
            NewRow(key_of(item.id), first + number, line, item)
            for number, (item, line) in enumerate(zip(items, lines, strict=True))
        ]
        for row in rows:
            self._check_size(row)
        kept = {item.id for item in items}
        gone = [one for one in remove if one not in kept and (self._items is None or one in self._items)]
        for item_id in (*gone, *kept):
            self._forget(item_id)
        if rows or gone:
            self._count = None
        if rows or gone or notes is not None:
            self._rows.write(rows, [key_of(one) for one in gone], notes)
        if rows:
            self._next_position = first + len(rows)
        self._num_written += len(rows)
        if self._items is not None:
            for item_id in (*gone, *kept):
                self._items.pop(item_id, None)
            self._items.update({item.id: dict(item.metadata) for item in items})
        for item in items:
            self._keep(NewItem(item.id, item.vector_D.astype(np.float32), dict(item.metadata), item.thumbnail))

    def _check_size(self, row: NewRow) -> None:
        """Raises DataError for more than a row of the store holds."""
        store, thumbnail = self._rows, row.item.thumbnail
        if len(row.line) > store.largest_text:
            raise DataError(
                f"id {row.item.id!r}: its metadata take {len(row.line)} bytes, {store.name} holds {store.largest_text}"
            )
        if len(thumbnail) > store.largest_thumbnail:
            raise DataError(
                f"id {row.item.id!r}: its thumbnail has {len(thumbnail)} bytes, {store.name} holds "
                f"{store.largest_thumbnail}; give a smaller --thumbnail-size"
            )

    def finish(self) -> None:
        """Has the server prepare for searches what was written now."""
        self._rows.finish(self._num_written)
        self._num_written = 0


def _bytes_of(item: NewItem) -> int:
    return item.vector_D.nbytes + len(item.thumbnail) + 200
