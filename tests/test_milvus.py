"""Indexes in Milvus: addresses, commands, kills, and servers that are away or slow."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import milvus_server
import numpy as np
import pytest
from serving import WatchedBackend, data_url, served
from test_serve_command import started

from cn_clip import cli
from cn_clip.clip.encoder import Encoder
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError, StoreError
from cn_clip.index.options import with_store
from cn_clip.leases import Claim, LeaseLostError
from cn_clip.retrieval import flat, milvus_collection, remote
from cn_clip.retrieval.addresses import open_index, open_writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.milvus_address import Address, parse_address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.remote_rows import Facts, NewRow, TooLargeError, key_of
from cn_clip.retrieval.writer import NewItem
from cn_clip.secret import Secret

MODEL = ModelInfo("Tiny", "0123", 16)
BUILD = ("--model", "Emoji-Tiny", "--num-threads", "1")
needs_server = pytest.mark.milvus


@pytest.fixture
def address() -> Iterator[Address]:
    """A collection that is not there yet."""
    with milvus_server.collection() as one:
        yield one


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command: the JSON it prints, or the error line."""

    def call(*args: object, fails: bool = False) -> Any:
        if not fails:
            cli.main([*map(str, args), "--json"])
            return json.loads(capsys.readouterr().out)
        with pytest.raises(SystemExit, match=r"^1$"):
            cli.main([*map(str, args)])
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.count("\n") == 1
        return out.err.removeprefix("error: ").strip()

    return call


def rows(count: int, *, seed: int = 0, dim: int = 16) -> Any:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("milvus://localhost:19530/photos", Address("localhost", 19530, "photos")),
        ("milvus://localhost/photos", Address("localhost", 19530, "photos")),
        ("milvus://a:b%40c@[::1]:1/p_1?timeout=2.5", Address("::1", 1, "p_1", 2.5, "a", Secret("b@c"))),
        ("milvus://h/c?consistency=bounded", Address("h", 19530, "c", consistency="Bounded")),
        ("milvus://h/c?consistency=quick", None),
        ("milvus://localhost:19530", None),
        ("milvus://localhost:19530/", None),
        ("milvus://localhost:19530/a/b", Address("localhost", 19530, "b", database="a")),
        ("milvus://localhost:19530/a/b/c", None),
        ("milvus://localhost:19530/照片", None),
        ("milvus://localhost:x/photos", None),
        ("milvus://localhost:99999/photos", None),
        ("milvus://localhost/photos?timeout=0", None),
        ("milvus://localhost/photos?timeout=nan", None),
        ("milvus://localhost/photos?timeout=x", None),
        ("milvus://localhost/photos?tls=2", None),
        ("milvus://localhost/photos?color=1", None),
    ],
)
def test_addresses(text: str, expected: Address | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="expected milvus://HOST:PORT/COLLECTION"):
            parse_address(text)
    else:
        assert parse_address(text) == expected


def test_passwords_are_never_shown() -> None:
    assert str(parse_address("milvus://me:secret@localhost/photos")) == "milvus://localhost:19530/photos"
    for text in (
        "milvus://me:secret@localhost/照片",
        "milvus://me:sec/ret@localhost/photos",
        "milvus://me:secret@ret@localhost:x/photos",
        "milvus://me:sec\nret@localhost:x/photos",
        "milvus://me:sec#ret@localhost/photos",
        "milvus:me:secret@localhost/photos",
        "milvus://[me:secret@localhost/photos",
    ):
        with pytest.raises(ConfigError, match="expected milvus://HOST:PORT/COLLECTION") as caught:
            parse_address(text)
        assert "sec" not in str(caught.value).removesuffix("?timeout=SECONDS"), text
        assert "ret" not in str(caught.value), text


def test_store_stands_for_the_index_wherever_it_is_given() -> None:
    for args in (["--store", "S", "a", "--k", "3"], ["a", "--store", "S", "--k", "3"], ["a", "--k", "3", "--store=S"]):
        assert with_store(args) == ["S", "a", "--k", "3"]
    assert with_store(["i", "a"]) == ["i", "a"]
    assert with_store(["i", "--", "--store"]) == ["i", "--", "--store"]
    assert with_store(["a", "--store", "milvus://h/c"], "--output") == ["--output", "milvus://h/c", "a"]
    assert with_store(["a", "--output", "i"], "--output") == ["a", "--output", "i"]


@pytest.mark.parametrize("command", ["index build", "index add", "index remove", "index info", "search"])
def test_store_is_no_option_of_its_own_any_more(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command.split(), "--help"])
    shown = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    assert "--store" not in shown
    assert "The folder of the index, or milvus://HOST:PORT/COLLECTION" in shown


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "--output: expected the folder of the index, or milvus://HOST:PORT/COLLECTION"),
        (("--output", "i", "--store", "milvus://h/c"), "expected the folder of the index, or in its place --store"),
        (("--store", "milvus://h/c", "--engine", "exact"), "are for folders, Milvus has its own"),
        (("--output", "milvus://h/c", "--engine", "exact"), "are for folders, Milvus has its own"),
        (("--output", "milvus://h/c/d/e"), "milvus://h/c/d/e: expected milvus://HOST:PORT/COLLECTION"),
        (("--store", "milvus://h/c", "--vector-type", "float16"), "are for folders, Milvus has its own"),
        (("--store", "h/c"), "--store: expected milvus://HOST:PORT/COLLECTION"),
    ],
)
def test_faulty_settings_are_refused(args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["index", "build", "pictures", *args])
    assert sentence in " ".join(re.sub("[│|]", " ", capsys.readouterr().err).split())


def test_check_is_for_folders(run: Callable[..., Any]) -> None:
    assert "Milvus looks after its own files" in run("index", "check", "milvus://localhost/c", fails=True)


def test_without_the_package_the_command_that_installs_it_is_said(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert "pip install 'cn-clip-next[milvus]'" in run("index", "info", "--store", "milvus://localhost/c", fails=True)


# --- commands


@needs_server
def test_the_commands_do_with_milvus_what_they_do_with_a_folder(
    tmp_path: Path, address: Address, run: Callable[..., Any]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, one in enumerate(emoji.load("twemoji")[:12]):
        (pictures / f"{number:02d}.png").write_bytes(emoji.png(one))
    (pictures / "copy.png").write_bytes((pictures / "03.png").read_bytes())
    (tmp_path / "t.csv").write_text("image,group,year\n01.png,甲,2020\n02.png,乙,2021\n03.png,甲,2022\n")
    table = ("--metadata", tmp_path / "t.csv")
    at = (("--output", tmp_path / "i"), ("--store", address))
    folder, server = (run("index", "build", pictures, *place, *table, *BUILD) for place in at)
    assert (server["encoded"], server["reused"], server["num_items"]) == (12, 1, 13)
    assert {**server, "index": ""} == {**folder, "index": ""}
    query = ("笑", "--image", pictures / "05.png", "--where", "year>=2021")
    folder, server = (run("search", *place, *query) for place in ((tmp_path / "i",), ("--store", address)))
    assert [hit["metadata"] for hit in server["hits"]] == [hit["metadata"] for hit in folder["hits"]]
    assert run("index", "build", pictures, "--store", address)["unchanged"] == 13
    (pictures / "00.png").unlink()
    assert run("index", "build", pictures, "--store", address)["removed"] == ["00.png"]
    assert run("index", "add", "--store", address, pictures / "01.png", "--id-prefix", "x/")["reused"] == 1
    assert run("index", "remove", "--store", address, "--where", "group=甲")["removed"] == ["01.png", "03.png"]
    info = run("index", "info", "--store", address)
    assert (info["num_items"], info["engine"], info["source"]) == (11, "milvus", str(pictures))
    assert info["model"] == {"name": "Emoji-Tiny", "fingerprint": "dd8b50067459b177", "embed_dim": 256}
    run("search", "--store", address, "--id", "x/01.png", "--grid", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


@needs_server
def test_collections_of_others_are_left_alone(address: Address, run: Callable[..., Any]) -> None:
    collection = Collection(address)
    collection.call("create_collection", dimension=8)
    assert run("index", "info", "--store", address, fails=True) == (
        f"{address}: this collection is no index; give another name"
    )
    with milvus_server.collection() as absent:
        assert f"{absent}: is no index; build one with: cn-clip index build PICTURES --output {absent}" in run(
            "search", "--store", absent, "猫", fails=True
        )


# --- the service


def answer(url: str, **request: object) -> Any:
    """What /v1/search says."""
    return httpx.post(f"{url}/v1/search", json=request, timeout=60).json()


@needs_server
def test_the_service_searches_an_index_in_milvus(tmp_path: Path, address: Address, run: Callable[..., Any]) -> None:
    for number, one in enumerate(emoji.load("twemoji")[:4]):
        (tmp_path / f"{number}.png").write_bytes(emoji.png(one))
    picture = (tmp_path / "2.png").read_bytes()
    (tmp_path / "3.png").rename(tmp_path / "bare.png")
    run("index", "build", tmp_path, "--store", address, *BUILD, "--thumbnail-size", 0)
    (tmp_path / "2.png").write_bytes(picture + b"\0")
    run("index", "build", tmp_path, "--store", address)
    with started(str(address)) as (_, url):
        (hit,) = answer(url, query={"image": data_url(picture)}, k=1, where="width>0")["data"]
        assert (hit["id"], round(hit["score"], 4)) == ("2.png", 1)
        assert httpx.get(f"{url}{hit['thumbnail']}").content.startswith(b"\xff\xd8")
        assert len(answer(url, query=[{"text": "笑"}, {"id": "bare.png", "weight": 2}])["data"]) == 4
        for name, message in (
            ("bare.png", "the item 'bare.png' has no thumbnail"),
            ("absent", "id: the index has no item 'absent'"),
        ):
            found = httpx.get(f"{url}/v1/index/thumbnails/{name}")
            assert found.status_code == 404
            assert found.json()["error"] == {
                "message": message,
                "type": "invalid_request_error",
                "param": "id",
                "code": "not_found",
            }
        error = answer(url, query="笑", where="color=1")["error"]
        assert error["message"].startswith("where: no item has the field 'color'; ")
        assert (error["param"], error["code"]) == ("where", "invalid_value")


@needs_server
def test_the_service_says_that_milvus_does_not_answer_and_goes_on(address: Address) -> None:
    with open_writer(address, Manifest(ModelInfo("Tiny", "0123", 4))) as opened:
        opened.commit([NewItem("a", rows(1, dim=4)[0])])
    with contextlib.closing(milvus_server.Relay(address.host, address.port)) as relay:
        index = open_index(Address("127.0.0.1", relay.port, address.collection, timeout=1))
        with served(Encoder(WatchedBackend()), index=index) as url:
            assert [hit["id"] for hit in answer(url, query="笑")["data"]] == ["a"]
            relay.stall()
            for method, path, body in (
                ("POST", "/v1/search", {"query": "笑"}),
                ("POST", "/v1/search", {"query": {"id": "a"}}),
                ("GET", "/v1/index/thumbnails/a", None),
            ):
                found = httpx.request(method, f"{url}{path}", json=body, timeout=60)
                assert (found.status_code, found.headers["Retry-After"]) == (503, "5")
                assert found.json()["error"]["message"].endswith("; the server's log tells why")
                assert found.json()["error"]["code"] == "index_unavailable"
            found = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "笑"})
            assert found.status_code == 200


# --- items


@needs_server
def test_the_graph_of_milvus_finds_what_is_exact(address: Address) -> None:
    vectors, queries = rows(6000, dim=64), rows(20, seed=1, dim=64)
    with open_writer(address, Manifest(ModelInfo("Tiny", "0123", 64))) as opened:
        opened.commit([NewItem(number, vector) for number, vector in enumerate(vectors)])
    Collection(address).call("flush")
    exact = flat.top_k(queries, vectors, 10).indices
    found = [{hit.id for hit in hits} for hits in open_index(address).search(queries, 10)]
    assert np.mean([len(one & set(best)) / 10 for one, best in zip(found, exact.tolist(), strict=True)]) >= 0.95


@needs_server
def test_few_that_fit_are_found_among_many_in_small_answers(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGEST_LIMIT", 64)
    for module in (remote, milvus_collection):
        monkeypatch.setattr(module, "WINDOW", 100)
    monkeypatch.setattr(milvus_collection, "UPSERT_BYTES", 5000)
    vectors, query = rows(700), rows(1, seed=1)
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem(number, vector, {"n": number}) for number, vector in enumerate(vectors)])
        opened.commit(remove=range(100, 400))
    order = np.argsort(-(vectors @ query[0]))
    index = open_index(address)
    assert index.ids == [*range(100), *range(400, 700)]
    for where, fits in (("n>=650", lambda n: n >= 650), ("n!=1", lambda n: n != 1)):
        expected = [n for n in order.tolist() if fits(n) and not 100 <= n < 400]
        for k in (1, 20, 1000):
            assert [hit.id for hit in index.search(query, k, where=where)[0]] == expected[:k]


@needs_server
def test_what_milvus_cannot_hold_is_refused_and_nothing_changes(address: Address) -> None:
    (vector,) = rows(1)
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("a", vector)])
        for item, sentence in (
            (NewItem("b", vector, thumbnail=b"x" * 49152), "id 'b': its thumbnail has 49152 bytes, Milvus holds 49149"),
            (NewItem("b", vector, {"text": "x" * 65536}), "id 'b': its metadata take"),
            (NewItem("a", vector[:3]), "id 'a': expected a vector of 16 numbers"),
        ):
            with pytest.raises(DataError, match=re.escape(sentence)):
                opened.commit([NewItem("c", vector), item], remove=["a"])
        opened.commit([NewItem("b", vector, {"text": "x" * 65400}, b"x" * 49149)])
    index = open_index(address)
    assert index.ids == ["a", "b"]
    assert index.thumbnail("b") == b"x" * 49149


WRITE = """
import sys
import numpy as np
from cn_clip.retrieval import addresses, milvus_address, writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
rows = np.eye(16, dtype=np.float32)
address = milvus_address.parse_address(sys.argv[1])
with addresses.open_writer(address, Manifest(ModelInfo("Tiny", "0123", 16))) as opened:
    for number in range(10**6):
        opened.commit([writer.NewItem(one % 50, rows[one % 16], {"n": number}) for one in range(number, number + 10)])
        print(number, flush=True)
"""


@needs_server
@pytest.mark.parametrize("reports", [1, 9, 100])
def test_after_a_kill_every_item_is_there_once(address: Address, reports: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE, address_text(address)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(reports):
            seen = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    index = open_index(address)
    assert len(set(index.ids)) == len(index.ids) == len(index)
    assert set(index.ids) >= {one % 50 for one in range(max(0, seen - 40), seen + 10)}
    (hits,) = index.search(np.ones((1, 16), dtype=np.float32), 100)
    assert sorted(map(str, (hit.id for hit in hits))) == sorted(map(str, index.ids))
    assert index.metadata((seen + 9) % 50)["n"] >= seen


# --- servers that are away or slow


def address_text(address: Address, timeout: float = 20) -> str:
    """As a user types it."""
    return f"{address}?timeout={timeout:g}"


def assert_ends_in_time(run: Callable[..., Any], address: Address, reason: str) -> None:
    """Within the time of the address, in one sentence with it."""
    for args in (
        ("search", "--store", address_text(address, 2), "--id", "a"),
        ("index", "info", address_text(address, 2)),
    ):
        started = time.monotonic()
        message = run(*args, fails=True)
        assert message.startswith(f"{address}: Milvus did not answer within 2 s ({reason}")
        assert time.monotonic() - started < 10


@pytest.mark.milvus
def test_nobody_listening_is_said_in_time(run: Callable[..., Any]) -> None:
    pytest.importorskip("pymilvus")
    assert_ends_in_time(
        run, Address("127.0.0.1", milvus_server.free_port(), "photos"), "connection refused: nothing listens"
    )


@pytest.mark.milvus
def test_a_listener_that_never_answers_is_said_in_time(run: Callable[..., Any]) -> None:
    pytest.importorskip("pymilvus")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert_ends_in_time(run, Address("127.0.0.1", silent.getsockname()[1], "photos"), "no answer")


@needs_server
def test_a_server_that_stops_answering_is_said_in_time(address: Address) -> None:
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("a", rows(1)[0])])
    with contextlib.closing(milvus_server.Relay(address.host, address.port)) as relay:
        near = Address("127.0.0.1", relay.port, address.collection, timeout=2)
        index = open_index(near)
        assert [hit.id for hit in index.search(rows(1), 1)[0]] == ["a"]
        with open_writer(near) as opened:
            assert list(opened.items()) == [("a", {})]
            relay.stall()
            for act in (lambda: index.search(rows(1), 1), lambda: opened.commit([NewItem("b", rows(1)[0])])):
                started = time.monotonic()
                with pytest.raises(StoreError, match=f"^{near}: .* did not answer within 2 s"):
                    act()
                assert time.monotonic() - started < 10
            assert list(opened.items()) == [("a", {})]


@needs_server
def test_a_server_that_comes_up_late_is_waited_for(address: Address) -> None:
    port, relays = milvus_server.free_port(), list[milvus_server.Relay]()
    timer = threading.Timer(1.0, lambda: relays.append(milvus_server.Relay(address.host, address.port, port)))
    timer.start()
    assert Collection(Address("127.0.0.1", port, address.collection, timeout=20)).facts() is None
    timer.join()
    relays[0].close()


class KeptRows(Collection):
    """In place of a collection on a server: rows by their keys, and for how many a call asked.

    largest: more rows are refused, as a server does with an answer of too many bytes. guard: "" for format 1.
    """

    def __init__(self, items: list[NewItem], *, largest: int = 10**9, guard: str = "built_1") -> None:
        self.asked: list[int] = []
        self._guard, self._largest, self.address = guard, largest, Address("h", 1, "c")
        keys = [key_of(item.id) for item in items]
        lines = [json.dumps({"id": item.id, "metadata": {"n": item.id}}).encode() for item in items]
        new = [NewRow(key, 0, line, item) for key, line, item in zip(keys, lines, items, strict=True)]
        self._rows = {row.key: self.fields_of(row) for row in new}

    def query(self, condition: str, fields: Sequence[str], *, limit: int | None = None) -> list[dict[str, Any]]:
        keys, end = json.JSONDecoder().raw_decode(condition.removeprefix("key in "))
        self.asked.append(len(keys))
        if len(keys) > self._largest:
            raise TooLargeError("an answer would be larger")
        is_bare_too = condition.removeprefix("key in ")[end:] == ""
        found = [self._rows[key] for key in keys if key in self._rows]
        return [
            milvus_collection._read({field: row[field] for field in fields})
            for row in found
            if row["thumbnail"] or is_bare_too
        ]


def pictured(count: int) -> list[NewItem]:
    """Items, every second one with a thumbnail."""
    return [NewItem(number, np.full(16, number), {}, b"jpg" if number % 2 else b"") for number in range(count)]


def writer_of(rows: KeptRows) -> remote.RemoteWriter:
    """A writer without a server."""
    return remote.RemoteWriter(rows, Facts(MODEL, 0, ""))


@pytest.mark.parametrize("guard", ["built_1", ""])
def test_many_items_and_thumbnails_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    items = pictured(10)
    rows = KeptRows(items, guard=guard)
    index = object.__new__(remote.RemoteIndex)
    index._rows = rows
    assert index.with_thumbnail([*range(10), "none"]) == {1, 3, 5, 7, 9}
    assert index.thumbnails([*range(10), "none"]) == dict.fromkeys([1, 3, 5, 7, 9], b"jpg")
    writer = writer_of(rows)
    monkeypatch.setattr(milvus_collection, "WINDOW", 6)
    stored = writer.stored([*range(10), "none"])
    assert {one.id: (one.vector_D[0], one.metadata["n"], one.thumbnail) for one in stored.values()} == {
        item.id: (item.id, item.id, item.thumbnail) for item in items
    }
    assert rows.asked == [11, 11, 6, 5]


def test_what_was_read_a_moment_ago_or_may_be_asked_for_next_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    items = pictured(10)
    rows = KeptRows(items)
    writer = writer_of(rows)
    assert set(writer.stored([1, 2], soon=[2, 3, 4, "none"])) == {1, 2}
    assert set(writer.stored([3, 4, 1], soon=[5])) == {1, 3, 4}
    assert rows.asked == [5]
    monkeypatch.setattr(remote, "KEPT_BYTES", 3 * 350)
    assert [one.id for one in writer.stored(range(5, 10)).values()] == [5, 6, 7, 8, 9]
    assert writer._kept_bytes <= 3 * 350
    assert set(writer.stored([9, 5])) == {9, 5}
    assert rows.asked == [5, 5, 1]


def test_answers_that_are_too_large_are_asked_for_in_parts() -> None:
    items = pictured(10)
    rows = KeptRows(items, largest=3)
    found = writer_of(rows).stored(range(10))
    assert list(found) == list(range(10))
    assert rows.asked == [10, 2, 2, 2, 2, 2]
    with pytest.raises(TooLargeError, match="an answer would be larger"):
        writer_of(KeptRows(items, largest=0)).stored(range(10))


# --- larger, replaced and older collections


@needs_server
def test_an_index_of_large_metadata_is_read_changed_and_searched(address: Address) -> None:
    vectors, query = rows(1300), rows(1, seed=1)
    text = "x" * 60000
    with open_writer(address, Manifest(MODEL)) as opened:
        for start in range(0, 1300, 100):
            some = range(start, start + 100)
            opened.commit([NewItem(one, vectors[one], {"n": one, "text": text}) for one in some])
    order = np.argsort(-(vectors @ query[0])).tolist()
    with open_writer(address) as opened:
        assert len(opened) == 1300
        opened.commit([NewItem("more", vectors[0], {"n": -1})], remove=[0])
    index = open_index(address)
    assert index.ids == [*range(1, 1300), "more"]
    order[order.index(0)] = "more"
    assert [hit.id for hit in index.search(query, 1299)[0]] == order[:1299]
    assert [hit.id for hit in index.search(query, 1300, where="n>=650 n<1299")[0]] == [
        one for one in order if one != "more" and 650 <= one < 1299
    ]
    assert index.search(query, 3, where="text~yx")[0] == []


def made_again(address: Address, model: ModelInfo, vectors: Any) -> None:
    """The collection dropped, and built from other vectors."""
    Collection(address).call("drop_collection")
    with open_writer(address, Manifest(model)) as opened:
        opened.commit([NewItem("new", vector, {"n": 0}, b"jpg") for vector in vectors[:1]])


@needs_server
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (ModelInfo("Other", "4567", 16), r"vectors are now of the model Other \(4567\), not of Tiny \(0123\); open"),
        (MODEL, "of the model Tiny"),  # it knows other items
    ],
)
def test_a_writer_does_not_write_into_a_collection_that_was_made_again(
    address: Address, model: ModelInfo, told: str
) -> None:
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("old", rows(1)[0], {"n": 0}, b"jpg")])
        made_again(address, model, rows(1))
        for act in (
            lambda: opened.commit([NewItem("more", rows(1)[0])]),
            lambda: opened.commit(remove=["old"]),
            lambda: opened.describe(engine=None, source="elsewhere"),
        ):
            with pytest.raises(StoreError, match=rf"was made again .*{told}"):
                act()
    assert open_index(address).ids == ["new"]


@needs_server
def test_the_service_does_not_answer_from_a_collection_of_another_model(address: Address) -> None:
    with open_writer(address, Manifest(ModelInfo("Tiny", "0123", 4))) as opened:
        opened.commit([NewItem("a", rows(1, dim=4)[0])])
    with served(Encoder(WatchedBackend()), index=open_index(address, is_served=True)) as url:
        assert [hit["id"] for hit in answer(url, query="笑")["data"]] == ["a"]
        made_again(address, ModelInfo("Other", "4567", 4), rows(1, dim=4))
        found = httpx.post(f"{url}/v1/search", json={"query": "笑"}, timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "index_unavailable")


def make_old(address: Address) -> None:
    """A collection as it was made before conditions went to the server."""
    collection = Collection(address)
    kinds, client = collection._package.DataType, collection._client
    description = json.dumps({"cn_clip": 1, "model": {"name": "Tiny", "fingerprint": "0123", "embed_dim": 16}})
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    schema.add_field("key", kinds.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("place", kinds.INT64)
    for name in ("item", "thumbnail"):
        schema.add_field(name, kinds.VARCHAR, max_length=65535)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=16)
    collection.call("create_collection", schema=schema, consistency_level="Strong")


@needs_server
def test_a_collection_from_before_is_read_and_changed_as_it_was(address: Address) -> None:
    make_old(address)
    vectors = rows(60)
    with open_writer(address) as opened:
        small = {one: b"jpg" if one % 2 else b"" for one in range(60)}
        opened.commit([NewItem(one, vectors[one], {"n": one}, small[one]) for one in range(60)])
        opened.commit([NewItem("more", vectors[0])], remove=[0])
    index = open_index(address)
    order = [one for one in np.argsort(-(vectors @ vectors[7])).tolist() if one]
    assert [hit.id for hit in index.search(vectors[7:8], 5, where="n>=1")[0]] == order[:5]
    assert [hit.id for hit in index.search(vectors[7:8], 5, where="n=7,9")[0]] == [
        one for one in order if one in (7, 9)
    ]
    assert index.search(vectors[7:8], 5, where="n=99")[0] == []
    with pytest.raises(ConfigError, match="no item has the field 'm'"):
        index.search(vectors[7:8], 5, where="m=99")
    assert index.with_thumbnail([1, 2, 3]) == {1, 3}
    assert index.has_thumbnails
    made_again(address, ModelInfo("Other", "4567", 16), rows(1))
    with pytest.raises(StoreError, match=r"was made again .* of the model Other"):
        index.search(vectors[7:8], 5)


# --- one writer at a time, and what a change costs


@needs_server
def test_a_second_writer_is_told_who_is_first(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_collection, "TTL_S", 1.5)
    with open_writer(address, Manifest(MODEL)) as first:
        first.commit([NewItem("a", rows(1)[0])])
        sentence = rf"^{address}: another process is changing this index \(pid \d+ on .*\); wait until it has ended"
        with pytest.raises(ConfigError, match=sentence), open_writer(address, Manifest(MODEL)):
            pass
        first.commit([NewItem("b", rows(1)[0])])
    with open_writer(address) as second:
        assert [item_id for item_id, _ in second.items()] == ["a", "b"]


@needs_server
def test_a_killed_writer_is_waited_for_and_one_taken_for_dead_writes_no_more(
    address: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_writer(address, Manifest(MODEL)) as first:
        first.commit([NewItem("a", rows(1)[0])])
        killed = Claim("other", 7, 1.5, "pid 1 on h, since then").to_text()
        Collection(address).call("alter_collection_properties", properties={milvus_collection._LEASE: killed})
        with pytest.raises(LeaseLostError, match=r"another process is changing this index \(pid 1 on h"):
            first.commit([NewItem("b", rows(1)[0])])
        with pytest.raises(LeaseLostError, match=r"another process is changing this index \(pid 1 on h"):
            first.commit(remove=["a"])
    with open_writer(address) as second:
        assert list(second.items()) == [("a", {})]
    assert [record.getMessage() for record in caplog.records if record.name == milvus_collection.__name__] == [
        f"{address}: another process is changing this index (pid 1 on h, since then); waiting up to 30 s to see "
        "whether it still runs"
    ]


@needs_server
def test_a_change_costs_the_same_in_an_index_of_any_size(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, call = list[str](), Collection.call

    def counted(collection: Collection, method: str, **options: Any) -> Any:
        asked.append(method)
        return call(collection, method, **options)

    monkeypatch.setattr(Collection, "call", counted)
    monkeypatch.setattr(Collection, "scan", None)
    costs, vectors = list[tuple[list[str], ...]](), rows(600)
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("first", vectors[0], {"n": 0})])
    for size in (20, 400):
        with open_writer(address) as opened:
            opened.commit([NewItem(f"{size}/{one}", vectors[one], {"n": one}) for one in range(size)])
        asked.clear()
        with open_writer(address) as opened:
            opened.commit([NewItem(f"{size}/new", vectors[0], {"n": 10**6})])
        added = asked.copy()
        asked.clear()
        with open_writer(address) as opened:
            assert opened.called([f"{size}/new", "none"]) == {f"{size}/new": f"{size}/new"}
            opened.commit(remove=[f"{size}/new"])
            assert len(opened) == (21 if size == 20 else 421)
        costs.append((added, asked.copy()))
    assert costs[0] == costs[1]
    assert added.count("query") == 1
    assert asked.count("query") == 2
    assert max(map(len, costs[0])) <= 16


@needs_server
def test_positions_go_on_where_another_version_has_written(address: Address) -> None:
    vectors = rows(1)
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem(one, vectors[0]) for one in range(30)])
    Collection(address).call("alter_collection_properties", properties={milvus_collection._NEXT_PLACE: "3"})
    with open_writer(address) as opened:
        opened.commit([NewItem("last", vectors[0])], remove=range(29))
    index = open_index(address)
    assert index.ids == [29, "last"]


@needs_server
def test_adding_a_picture_does_not_go_through_the_index(
    tmp_path: Path, address: Address, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, numbers in (("many", range(6)), ("one", range(6, 7))):
        (tmp_path / folder).mkdir()
        for number in numbers:
            (tmp_path / folder / f"{number}.png").write_bytes(emoji.png(emoji.load("twemoji")[number]))
    (tmp_path / "one" / "copy.png").write_bytes((tmp_path / "many" / "3.png").read_bytes())
    run("index", "build", tmp_path / "many", "--store", address, *BUILD)
    monkeypatch.setattr(remote.RemoteWriter, "items", None)
    added = run("index", "add", address, tmp_path / "one", "--id-prefix", "x/")
    assert (added["encoded"], added["reused"], added["num_items"]) == (1, 1, 8)
    assert added["duplicates"] == [{"id": "x/copy.png", "same_as": "3.png"}]
    again = run("index", "add", address, tmp_path / "one", "--id-prefix", "x/")
    assert (again["unchanged"], again["num_items"]) == (2, 8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "3.png").write_bytes(b"")
    assert "has an item 3.png of" in run("index", "add", address, other, fails=True)
