"""Opens an index for searching and changing, wherever its address says it is; the commands use it."""

from contextlib import AbstractContextManager
from typing import TypeAlias

from cn_clip.digests import is_there
from cn_clip.retrieval import manifest, milvus, milvus_collection, store, writer
from cn_clip.retrieval.ids import integers
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.milvus_address import Address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.retrieval.segments import ItemId

# What both kinds of index have is alike; the classes of folders say what it means.
Facts: TypeAlias = Manifest | milvus_collection.Facts
Searchable: TypeAlias = store.Index | milvus.MilvusIndex
Writer: TypeAlias = writer.IndexWriter | milvus.MilvusWriter


def facts(address: IndexAddress) -> Facts | None:
    """None when there is no index yet; raises DataError for one that cannot be read, StoreError."""
    if isinstance(address, Address):
        return Collection(address).facts()
    return manifest.read(address) if is_there(address / manifest.NAME) else None


def require(address: IndexAddress) -> Facts:
    """Raises DataError when there is no index."""
    return Collection(address).require() if isinstance(address, Address) else manifest.read(address)


def open_index(address: IndexAddress, *, is_served: bool = False) -> Searchable:
    """is_served: changes of others may take some seconds to be seen, so that no search waits for them.

    Raises DataError when there is no index, or a damaged one, StoreError.
    """
    if not isinstance(address, Address):
        return store.open_index(address)
    return milvus.MilvusIndex(address, consistency="Bounded" if is_served else "Strong")


def address_in(index: Searchable) -> IndexAddress:
    """Where an open index is, with all that opens it again."""
    return index.folder if isinstance(index, store.Index) else index.collection_address


def ping(index: Searchable) -> None:
    """Asks the server that keeps an index for as little as it may; raises AwayError if it does not answer, StoreError.

    A folder is there or not, which `open_index` says.
    """
    if isinstance(index, milvus.MilvusIndex):
        index.ping()


def open_writer(address: IndexAddress, create: Manifest | None = None) -> AbstractContextManager[Writer]:
    """create: what to begin with where there is no index yet; raises as `writer.open_writer`, and StoreError."""
    if not isinstance(address, Address):
        return writer.open_writer(address, create)
    return milvus.open_milvus_writer(address, create)


def item_called(index: Searchable, name: ItemId) -> ItemId | None:
    """The id as the index has it, 7 and "7" being one; None for an item that it has not."""
    other: ItemId | None = str(name) if isinstance(name, int) else None
    if isinstance(name, str):
        other = next(iter(integers(name)), None)
    return next((one for one in (name, other) if one is not None and one in index), None)
