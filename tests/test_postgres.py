"""Indexes in Postgres: addresses, tables of others, permissions, writers, and servers that are away or killed."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import milvus_server
import numpy as np
import postgres_server
import pytest

from cn_clip import cli
from cn_clip.errors import AwayError, ConfigError, DataError, StoreError
from cn_clip.retrieval import postgres_table
from cn_clip.retrieval.addresses import open_index, open_writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.postgres_address import Address, parse_address
from cn_clip.retrieval.writer import NewItem
from cn_clip.secret import Secret

MODEL = ModelInfo("Tiny", "0123", 16)
needs_server = pytest.mark.postgres


def rows(count: int, *, seed: int = 0, dim: int = 16) -> Any:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def address() -> Iterator[Address]:
    """A table that is not there yet."""
    with postgres_server.table() as one:
        yield one


# --- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgvector://h/db/photos", Address("h", 0, "db", "photos")),
        ("pgvector://me@h:5433/db/photos", Address("h", 5433, "db", "photos", user="me")),
        ("pgvector://a:b%40c@[::1]:1/d/p_1?timeout=2.5", Address("::1", 1, "d", "p_1", 2.5, "a", Secret("b@c"))),
        ("pgvector:///photos", Address("", 0, "", "photos")),
        ("pgvector:///db/photos", Address("", 0, "db", "photos")),
        (
            "pgvector:///p?sslmode=verify-full&service=home",
            Address("", 0, "", "p", settings={"sslmode": "verify-full", "service": "home"}),
        ),
        ("pgvector://h/db/p?host=/run", None),
        ("pgvector://h/db/照片", None),
        ("pgvector://h/a/b/c", None),
        ("pgvector://h", None),
        ("pgvector://h/db/", None),
        ("pgvector://h:x/db/p", None),
        ("pgvector://:pw@h/db/p", None),
        ("pgvector://h/db/p?timeout=0", None),
        ("pgvector://h/db/p?timeout=nan", None),
        ("pgvector://h/db/p?sslmod=require", None),
        ("pgvector://h/db/p?password=secret", None),
        ("pgvector://h/db/p?sslmode=", None),
        (f"pgvector://h/db/{'p' * 51}", None),
    ],
)
def test_addresses(text: str, expected: Address | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="expected pgvector://HOST:PORT/DATABASE/NAME"):
            parse_address(text)
    else:
        assert parse_address(text) == expected


def test_passwords_are_never_shown() -> None:
    address = parse_address("pgvector://me:secret@h/db/photos?sslpassword=hidden")
    assert str(address) == "pgvector://h/db/photos"
    assert "secret" not in repr(address)
    assert "hidden" not in repr(address)
    for text in ("pgvector://me:sec/ret@h/照片", "pgvector://me:sec@ret@h:x/d/p", "pgvector://me:sec#ret@h/d/p"):
        with pytest.raises(ConfigError) as caught:
            parse_address(text)
        assert "sec" not in str(caught.value).removesuffix("?timeout=SECONDS").replace("SECONDS", "")
        assert "ret" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("index", "build", "p", "--output", "pgvector://h/d/p", "--engine", "exact"), "Postgres has its own"),
        (("index", "check", "pgvector://h/d/p"), "Postgres looks after its own files"),
        (("index", "duplicates", "pgvector://h/d/p"), "an index in Postgres are not compared"),
        (("index", "info", "pgvectr://h/d/p"), "did you mean 'pgvector://'"),
    ],
)
def test_what_is_for_folders_is_refused(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(list(args))
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- who may do what


def said(act: Callable[[], Any], kind: type[Exception] = StoreError) -> str:
    """What is said when it is refused, without a secret."""
    with pytest.raises(kind) as caught:
        act()
    text = str(caught.value)
    assert postgres_server.PASSWORD not in text
    assert "\n" not in text
    return text


@needs_server
def test_what_is_no_index_is_refused_and_left_as_it_is(address: Address) -> None:
    with postgres_server.started().connect() as connection:
        connection.execute(f"CREATE TABLE {address.name} AS SELECT 7 AS seven")
        for comment, sentence in (
            ("of photos", "this table is no index; give another name"),
            ('{"cn_clip": 99}', "this table is no index"),
            (
                json.dumps(
                    {
                        "cn_clip": 99,
                        "change": "",
                        "guard": "",
                        "source": "",
                        "pictures": None,
                        "model": {"name": "", "fingerprint": "", "embed_dim": 1},
                    }
                ),
                "is of format 99, this version reads 1; build it again",
            ),
        ):
            connection.execute(f"COMMENT ON TABLE {address.name} IS '{comment}'")
            assert sentence in said(lambda: open_index(address), DataError)

            def build() -> None:
                with open_writer(address, Manifest(MODEL)):
                    pass

            assert sentence in said(build, DataError)
        assert connection.execute(f"SELECT seven FROM {address.name}").fetchall() == [(7,)]
    with postgres_server.table() as absent:
        assert "is no index; build one with: cn-clip index build" in said(lambda: open_index(absent), DataError)


@needs_server
def test_logins_databases_and_permissions_that_do_not_fit_are_one_sentence_each(address: Address) -> None:
    server = postgres_server.started()

    def opened(**other: Any) -> str:
        values = {"database": "postgres", "user": "postgres", "password": Secret(postgres_server.PASSWORD), **other}
        at = Address("127.0.0.1", server.port, values["database"], address.name, 5, values["user"], values["password"])

        def build() -> None:
            with open_writer(at, Manifest(MODEL)):
                pass

        return said(build)

    assert "the server does not accept the user or the password" in opened(password=Secret("wrong"))
    assert "the server does not accept the user or the password" in opened(user="nobody")
    assert "the server has no such database" in opened(database="absent")
    with server.connect() as connection:
        connection.execute("CREATE ROLE small LOGIN PASSWORD 'small'")
        connection.execute("CREATE DATABASE bare")
        try:
            small = {"user": "small", "password": Secret("small")}
            assert "have an administrator run CREATE EXTENSION vector there" in opened(database="bare", **small)
            with server.connect("bare") as inner:
                inner.execute("CREATE EXTENSION vector SCHEMA public")
            assert "the user may not do that in this database" in opened(database="bare", **small)
            with server.connect("bare") as inner:
                inner.execute("CREATE SCHEMA apart")
                inner.execute("ALTER EXTENSION vector SET SCHEMA apart")
            there = server.address("photos", database="bare")
            with open_writer(there, Manifest(MODEL)) as writer:  # of an extension in a schema of its own
                writer.commit([NewItem("a", rows(1)[0])])
            assert [hit.id for hit in open_index(there).search(rows(1), 1)[0]] == ["a"]
        finally:
            connection.execute("DROP DATABASE bare WITH (FORCE)")
            connection.execute("DROP ROLE small")


@needs_server
def test_a_second_writer_is_refused_while_there_is_one(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_table, "LOCK_SECONDS", 0.2)
    with open_writer(address, Manifest(MODEL)) as writer:
        writer.commit([NewItem("a", rows(1)[0])])

        def second() -> None:
            with open_writer(address):
                pass

        assert "another process is changing this index; wait for it, or end it" in said(second)
        assert open_index(address).ids == ["a"]
    with open_writer(address) as writer:
        writer.commit(remove=["a"])
    assert open_index(address).ids == []


@needs_server
def test_larger_tables_have_a_graph_that_finds_what_is_exact(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_table, "LEAST_GRAPH", 1000)
    vectors, queries = rows(3000, dim=32), rows(20, seed=1, dim=32)
    with open_writer(address, Manifest(ModelInfo("Tiny", "0123", 32))) as writer:
        writer.commit([NewItem(one, vector, {"n": one % 10}) for one, vector in enumerate(vectors)])
        writer.finish()
    with postgres_server.started().connect() as connection:
        asked = "SELECT count(*) FROM pg_indexes WHERE tablename = %s AND indexdef LIKE '%%hnsw%%'"
        assert connection.execute(asked, [address.name]).fetchone() == (1,)
    index, order = open_index(address), np.argsort(-(queries @ vectors.T), axis=1)
    found = index.search(queries, 10)
    assert (
        np.mean([len({hit.id for hit in hits} & set(best[:10])) for hits, best in zip(found, order, strict=True)]) > 9
    )
    for hits, best in zip(index.search(queries, 5, where="n=3"), order, strict=True):
        assert [hit.id for hit in hits] == [one for one in best.tolist() if one % 10 == 3][:5]


@needs_server
@pytest.mark.parametrize("dim", [2500, 4500])
def test_long_vectors_are_found(address: Address, monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    monkeypatch.setattr(postgres_table, "LEAST_GRAPH", 10)
    vectors = rows(50, dim=dim)
    with open_writer(address, Manifest(ModelInfo("Tiny", "0123", dim))) as writer:
        writer.commit([NewItem(one, vector) for one, vector in enumerate(vectors)])
        writer.finish()
    order = np.argsort(-(vectors[:3] @ vectors.T), axis=1)
    assert [[hit.id for hit in hits] for hits in open_index(address).search(vectors[:3], 5)] == order[:, :5].tolist()


# --- servers that are away


@needs_server
def test_nobody_listening_and_a_server_that_hangs_are_said_in_time(address: Address) -> None:
    port = milvus_server.free_port()
    text = said(lambda: open_index(Address("127.0.0.1", port, "postgres", "photos", 1)), AwayError)
    assert text.startswith(f"pgvector://127.0.0.1:{port}/postgres/photos: Postgres did not answer within 1 s (")
    with open_writer(address, Manifest(MODEL)) as writer:
        writer.commit([NewItem("a", rows(1)[0])])
    with contextlib.closing(milvus_server.Relay("127.0.0.1", address.port)) as relay:
        secret = Secret(postgres_server.PASSWORD)
        near = Address("127.0.0.1", relay.port, "postgres", address.name, 1, "postgres", secret)
        index = open_index(near)
        relay.stall()
        assert "Postgres did not answer within 1 s" in said(lambda: index.search(rows(1), 1), AwayError)


@needs_server
def test_a_server_that_is_killed_and_comes_back_is_gone_on_with() -> None:
    with postgres_server.own() as server, postgres_server.table(server) as address:
        vectors = rows(30)
        with open_writer(address, Manifest(MODEL)) as writer:
            writer.commit([NewItem(one, vectors[one]) for one in range(10)])
            index = open_index(address)
            server.kill()
            timer = threading.Timer(1.0, server.start)
            timer.start()
            writer.commit([NewItem(one, vectors[one]) for one in range(10, 20)], remove=[0])
            timer.join()
            server.kill()
            server.start()
            assert [hit.id for hit in index.search(vectors[5:6], 1)[0]] == [5]
            assert index.ids == list(range(1, 20))


@needs_server
def test_a_writer_whose_connection_was_lost_goes_on_only_if_nobody_else_wrote(address: Address) -> None:
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'postgres'"
    )
    with postgres_server.started().connect() as connection, open_writer(address, Manifest(MODEL)) as writer:
        writer.commit([NewItem("a", rows(1)[0])])
        connection.execute(end)
        writer.commit([NewItem("b", rows(1)[0])])
        connection.execute(end)
        with open_writer(address) as other:
            other.commit(remove=["a"])
        act = lambda: writer.commit([NewItem("c", rows(1)[0])])  # noqa: E731
        assert "another process has changed this index while the connection was lost" in said(act)
    assert open_index(address).ids == ["b"]
