"""What a store on a server offers to `remote`: rows that are found by key, by vector and by condition.

`milvus_collection` and `postgres_table` are such stores. They say how large a row may be and ask for as much at once as
their server answers; what the rows mean is the same for all, and known to `remote` alone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from cn_clip.errors import DataError, StoreError
from cn_clip.retrieval.conditions import Condition
from cn_clip.retrieval.manifest import ModelInfo, PictureFacts, seen_alike
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.writer import NewItem

KEY_BYTES = 16
# Rows without their vectors in one answer: some 10 MB.
WINDOW = 8192

# A row as it is read: "key"; "place", which rises in order of insertion; "item", a line of JSON; "thumbnail", bytes;
# "vector". Those of its fields that were asked for.
Fields: TypeAlias = dict[str, Any]
# What a store made of a condition, read by this store alone; None admits all rows.
Filter: TypeAlias = str | None


@dataclass(frozen=True)
class Facts:
    """What an index on a server says of itself, and how many items it has.

    guard: differs for each that was made, under whatever name; "" where the store did not note it.
    """

    model: ModelInfo
    num_items: int
    source: str
    pictures: PictureFacts | None = None
    guard: str = ""
    engine: str = "milvus"
    vector_type: str = "float32"


class TooLargeError(StoreError):
    """An answer of more bytes than the server sends."""


class ReplacedError(StoreError):
    """The index was dropped and made again since it was opened."""


class NewRow(NamedTuple):
    """A row to write. line: the item as JSON, what "item" is when it is read."""

    key: str
    place: int
    line: bytes
    item: NewItem


def key_of(item_id: ItemId) -> str:
    """The primary key of an item: the same only for equal ids, and ASCII for any id."""
    return hashlib.blake2b(json.dumps(item_id).encode(), digest_size=KEY_BYTES).hexdigest()


class Rows(Protocol):
    """The rows of an index on a server that answered; all methods raise StoreError, and ReplacedError.

    Rows of another index that took its name are never among them, unless it was opened to read and the other is of the
    same model.
    """

    # What the store is called in sentences; the most bytes of an item's line and thumbnail.
    name: str
    largest_text: int
    largest_thumbnail: int

    @property
    def address(self) -> IndexAddress:
        """Where they are."""

    def ping(self) -> None:
        """Asks for as little as shows that the server answers; raises AwayError."""

    def facts(self, *, with_count: bool = True) -> Facts | None:
        """None when there is no index; raises DataError for what is none."""

    def create(self, model: ModelInfo, source: str, pictures: PictureFacts | None) -> None:
        """Makes the index of the vectors of a model."""

    def describe(self, source: str, pictures: PictureFacts | None) -> None:
        """Notes what the index was built from, and how its pictures were seen."""

    def alone(self) -> AbstractContextManager[None]:
        """Keeps other writers out meanwhile; raises ConfigError or StoreError while there is one."""

    def filter_of(self, condition: Condition) -> Filter:
        """Admits every row that the condition admits, and perhaps others; None where that would be all."""

    def query(self, condition: Filter, fields: Sequence[str], *, limit: int | None = None) -> list[Fields]:
        """The rows that a filter admits, in any order, at most `limit`; raises TooLargeError."""

    def count(self, condition: Filter = None) -> int:
        """How many rows it admits."""

    def nearest(self, vectors_QD: FloatArray, limit: int, fields: Sequence[str], condition: Filter) -> list[list[Any]]:
        """For each vector up to `limit` of the rows that it admits, about the nearest; raises TooLargeError."""

    def of_keys(self, keys: Sequence[str], fields: Sequence[str]) -> Iterator[Fields]:
        """The rows with these keys, in any order."""

    def scan(self, fields: Sequence[str], condition: Filter = None) -> Iterator[Fields]:
        """The rows that a filter admits, in order of insertion, with "place"."""

    def with_field(self, field: str) -> list[Fields]:
        """The "item" of one row at most whose metadata have this field, if rows can be asked for it."""

    def is_sure_of_fields(self) -> bool:
        """Whether `with_field` finds a row whenever there is one."""

    def has_thumbnails(self) -> bool:
        """Whether any row has one."""

    def with_thumbnail(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys whose rows have one."""

    def next_place(self) -> int:
        """More than the "place" of any row; for a writer."""

    def write(self, rows: Sequence[NewRow], remove: Sequence[str], notes: bytes | None = None) -> None:
        """Writes rows in place of those of the same keys, and removes others; killed meanwhile, each is old or new.

        notes: text that `notes` gives once all of the rows are there; None leaves what there is.
        """

    def notes(self) -> bytes:
        """What was noted last; nothing before, and where that was too long for the server."""

    def finish(self, num_written: int) -> None:
        """Has the server prepare for searches what was written since the last time."""


def require(rows: Rows, *, with_count: bool = True) -> Facts:
    """Raises DataError when there is no index."""
    facts = rows.facts(with_count=with_count)
    if facts is None:
        raise no_index(rows.address)
    return facts


def no_index(address: object) -> DataError:
    """Nothing was built there."""
    return DataError(f"is no index; build one with: cn-clip index build PICTURES --output {address}", at=address)


def check_followed(now: Facts, before: Facts, *, is_reader: bool, at: object) -> None:
    """Raises ReplacedError unless a reader may go on with an index that took the place of the one it opened."""
    is_alike = now.model == before.model and seen_alike(now.pictures, before.pictures)
    if not (is_alike and is_reader):
        raise ReplacedError(
            f"the index was made again since it was opened: its vectors are now of the model {_named(now)}, "
            f"not of {_named(before)}; open it again",
            at=at,
        )


def _named(facts: Facts) -> str:
    return f"{facts.model.name or '?'} ({facts.model.fingerprint or '?'})"
