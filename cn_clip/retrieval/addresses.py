"""Opens an index for searching and changing, wherever its address says it is; the commands use it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from cn_clip.digests import is_there
from cn_clip.retrieval import manifest, remote, remote_rows, store, writer
from cn_clip.retrieval.ids import integers
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.milvus_address import Address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.postgres_table import Table
from cn_clip.retrieval.schemes import IndexAddress, ServerAddress
from cn_clip.retrieval.segments import ItemId

# What both kinds of index have is alike; the classes of folders say what it means.
Facts: TypeAlias = Manifest | remote_rows.Facts
Searchable: TypeAlias = store.Index | remote.RemoteIndex
Writer: TypeAlias = writer.IndexWriter | remote.RemoteWriter


def rows_at(
    address: ServerAddress, *, is_reader: bool = False, is_served: bool = False, creates: bool = False
) -> remote_rows.Rows:
    """What a store on a server keeps; raises StoreError where no server answers, MissingExtraError.

    is_reader, is_served: see `remote_rows.Rows` and `open_index`. creates: else a folder of Milvus Lite that is not
    there is not made, and DataError is raised.
    """
    if not isinstance(address, Address):
        return Table(address, is_reader=is_reader)
    if _is_missing(address) and not creates:
        raise remote_rows.no_index(address)
    consistency = address.consistency or ("Bounded" if is_served else "Strong")
    return Collection(address, consistency=consistency, is_reader=is_reader)


def facts(address: IndexAddress) -> Facts | None:
    """None when there is no index yet; raises DataError for one that cannot be read, StoreError."""
    if not isinstance(address, Path):
        return None if _is_missing(address) else rows_at(address).facts()
    return manifest.read(address) if is_there(address / manifest.NAME) else None


def _is_missing(address: ServerAddress) -> bool:
    return isinstance(address, Address) and address.lite is not None and not address.lite.exists()


def require(address: IndexAddress) -> Facts:
    """Raises DataError when there is no index."""
    return manifest.read(address) if isinstance(address, Path) else remote_rows.require(rows_at(address))


def open_index(address: IndexAddress, *, is_served: bool = False) -> Searchable:
    """is_served: changes of others may take some seconds to be seen, so that no search waits for them.

    Raises DataError when there is no index, or a damaged one, StoreError.
    """
    if isinstance(address, Path):
        return store.open_index(address)
    return remote.RemoteIndex(rows_at(address, is_reader=True, is_served=is_served))


def address_in(index: Searchable) -> IndexAddress:
    """Where an open index is, with all that opens it again."""
    return index.folder if isinstance(index, store.Index) else index.opened_at


def is_remote(index: Searchable) -> bool:
    """Whether a server keeps it, so that whoever asks it waits."""
    return isinstance(index, remote.RemoteIndex)


def ping(index: Searchable) -> None:
    """Asks the server that keeps an index for as little as it may; raises AwayError if it does not answer, StoreError.

    A folder is there or not, which `open_index` says.
    """
    if isinstance(index, remote.RemoteIndex):
        index.ping()


def open_writer(address: IndexAddress, create: Manifest | None = None) -> AbstractContextManager[Writer]:
    """create: what to begin with where there is no index yet; raises as `writer.open_writer`, and StoreError."""
    if isinstance(address, Path):
        return writer.open_writer(address, create)
    return remote.open_remote_writer(rows_at(address, creates=create is not None), create)


def item_called(index: Searchable, name: ItemId) -> ItemId | None:
    """The id as the index has it, 7 and "7" being one; None for an item that it has not."""
    other: ItemId | None = str(name) if isinstance(name, int) else None
    if isinstance(name, str):
        other = next(iter(integers(name)), None)
    return next((one for one in (name, other) if one is not None and one in index), None)
