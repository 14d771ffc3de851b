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

IndexAddress: TypeAlias = Path | Address


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
    def address(self) -> str: ...
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
    def thumbnails(self, ids: Iterable[ItemId]) -> dict[ItemId, bytes]: ...
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


def address_of(text: str | os.PathLike[str]) -> IndexAddress:
    """milvus://… is an address, all else a folder; raises ConfigError for a faulty address."""
    given = os.fspath(text)
    return parse_address(given) if given.startswith(SCHEME) else Path(given)


def facts(address: IndexAddress) -> Facts | None:
    """None when there is no index yet; raises DataError for one that cannot be read, StoreError."""
    if isinstance(address, Address):
        return Collection(address).facts()
    return manifest.read(address) if is_there(address / manifest.NAME) else None


def require(address: IndexAddress) -> Facts:
    """Raises DataError when there is no index."""
    return Collection(address).require() if isinstance(address, Address) else manifest.read(address)


def open_index(address: IndexAddress) -> Searchable:
    """Raises DataError when there is no index, or a damaged one, StoreError."""
    return milvus.MilvusIndex(address) if isinstance(address, Address) else store.open_index(address)


def open_writer(address: IndexAddress, create: Manifest | None = None) -> AbstractContextManager[Writer]:
    """create: what to begin with where there is no index yet; raises as `writer.open_writer`, and StoreError."""
    if not isinstance(address, Address):
        return writer.open_writer(address, create)
    return milvus.open_milvus_writer(address, create.model if create else None, create.source if create else "")


def item_called(index: Searchable, name: ItemId) -> ItemId | None:
    """The id as the index has it, 7 and "7" being one; None for an item that it has not."""
    other: ItemId | None = str(name) if isinstance(name, int) else None
    if isinstance(name, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,511}", name):
        other = int(name)
    return next((one for one in (name, other) if one is not None and one in index), None)
