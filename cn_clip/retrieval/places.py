"""Where an index is, a folder or a collection of Milvus: opens it for searching and changing; the commands use it."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from cn_clip.digests import is_there
from cn_clip.retrieval import manifest, milvus, store, writer
from cn_clip.retrieval.manifest import EngineName, Manifest, ModelInfo
from cn_clip.retrieval.milvus_collection import SCHEME, Address, Collection, parse_address
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.store import Hit
from cn_clip.retrieval.writer import NewItem

Place: TypeAlias = Path | Address


class Facts(Protocol):
    """What an index says of itself."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def num_items(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def vector_type(self) -> str: ...


class Searchable(Protocol):
    """An index opened for searching; `store.Index` says what its members mean."""

    @property
    def place(self) -> str: ...
    @property
    def model(self) -> ModelInfo: ...
    @property
    def ids(self) -> list[ItemId]: ...
    def __len__(self) -> int: ...
    def __contains__(self, item_id: object) -> bool: ...
    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]: ...
    def search(
        self, vectors_QD: FloatArray, k: int, *, where: str | None = None, min_score: float | None = None
    ) -> list[list[Hit]]: ...
    def vector(self, item_id: ItemId) -> FloatArray: ...
    def metadata(self, item_id: ItemId) -> dict[str, Any]: ...
    def thumbnail(self, item_id: ItemId) -> bytes | None: ...
    def with_thumbnail(self, ids: Iterable[ItemId]) -> set[ItemId]: ...


class Writer(Protocol):
    """An index opened for changing; `writer.IndexWriter` says what its members mean."""

    @property
    def manifest(self) -> Facts: ...
    def __len__(self) -> int: ...
    def __contains__(self, item_id: object) -> bool: ...
    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]: ...
    def stored(self, ids: Iterable[ItemId]) -> dict[ItemId, NewItem]: ...
    def describe(self, *, engine: EngineName | None, source: str) -> None: ...
    def commit(self, items: Sequence[NewItem] = (), remove: Iterable[ItemId] = ()) -> None: ...
    def finish(self) -> None: ...


def place_of(text: str | os.PathLike[str]) -> Place:
    """milvus://… is an address, all else a folder; raises ConfigError for a faulty address."""
    given = os.fspath(text)
    return parse_address(given) if given.startswith(SCHEME) else Path(given)


def facts(place: Place) -> Facts | None:
    """None when there is no index yet; raises DataError for one that cannot be read, StoreError."""
    if isinstance(place, Address):
        return Collection(place).facts()
    return manifest.read(place) if is_there(place / manifest.NAME) else None


def require(place: Place) -> Facts:
    """Raises DataError when there is no index."""
    return Collection(place).require() if isinstance(place, Address) else manifest.read(place)


def open_index(place: Place) -> Searchable:
    """Raises DataError when there is no index, or a damaged one, StoreError."""
    return milvus.MilvusIndex(place) if isinstance(place, Address) else store.open_index(place)


def open_writer(place: Place, create: Manifest | None = None) -> AbstractContextManager[Writer]:
    """create: what to begin with where there is no index yet; raises as `writer.open_writer`, and StoreError."""
    if not isinstance(place, Address):
        return writer.open_writer(place, create)
    return milvus.open_milvus_writer(place, create.model if create else None, create.source if create else "")


def item_called(index: Searchable, name: ItemId) -> ItemId | None:
    """The id as the index has it, 7 and "7" being one; None for an item that it has not."""
    other: ItemId | None = str(name) if isinstance(name, int) else None
    if isinstance(name, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,511}", name):
        other = int(name)
    return next((one for one in (name, other) if one is not None and one in index), None)
