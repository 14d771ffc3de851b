"""The stores on servers that tests of all of them run over, each behind the marker that has its server."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import milvus_server
import postgres_server
import pytest

from cn_clip.retrieval import milvus_address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.schemes import ServerAddress

POSTGRES = pytest.param("postgres", marks=pytest.mark.postgres)
SERVERS = (pytest.param("milvus", marks=pytest.mark.milvus), POSTGRES)
REMOTE = (*milvus_server.BOTH, POSTGRES)
NAMES = ("milvus", "milvus-lite", "postgres")


@contextlib.contextmanager
def kept_by(store: str) -> Iterator[ServerAddress]:
    """The address of an index that is not there yet, in one of `NAMES`; it is dropped at the end."""
    opened: AbstractContextManager[ServerAddress]
    opened = postgres_server.table() if store == "postgres" else milvus_server.kept_by(store)
    with opened as address:
        yield address


def drop(address: ServerAddress) -> None:
    """The index is gone."""
    if isinstance(address, milvus_address.Address):
        Collection(address).call("drop_collection")
    else:
        with postgres_server.started().connect() as connection:
            connection.execute(f"DROP TABLE {address.name}")
