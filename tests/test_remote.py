"""Every store on a server gives a folder's answers: ids, order, scores, thumbnails and vectors, bit for bit."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores

from cn_clip.errors import StoreError
from cn_clip.retrieval import addresses, store
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.remote import RemoteIndex
from cn_clip.retrieval.schemes import ServerAddress
from cn_clip.retrieval.writer import NewItem, open_writer

NUM, DIM = 2000, 16
MODEL = ModelInfo("Tiny", "0123", DIM)
ODD = ["", " ", "'", '"', "\\", "%", "%s", "{}", "a/b", "..", "\0", "\n", "猫", "e\u0301", "é", "\U0001f600", "\ud800"]
ODD += [
    "null",
    "0",
    "-1",
    "1e5",
    "true",
    "$1",
    ":x",
    "--",
    "/*",
    "'; DROP TABLE x; --",
    "ａ",
    "x" * 300,
    "\u202e",
    "[]",
]
WHERES = (
    None,
    "n>=1900",
    "n=7,8,9..12",
    "n!=3",
    "word=猫",
    'word~"\'"',
    'word!~"%"',
    "date=2021-05",
    "date>=2021-05 n<700",
    "(word=a or n>=1500) not n=1501",
    "tag=海,山",
    "tag!=海",
    "n=99999",
)


def hostile(count: int) -> list[NewItem]:
    """Items of such ids and metadata, with many equal vectors."""
    chance = random.Random(20)
    vectors = np.random.default_rng(20).normal(size=(count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[::5] = vectors[0]
    found = []
    for number in range(count):
        odd = chance.choice(ODD)
        item_id = number - 1000 if number % 3 == 0 else f"{odd}{number}{chance.choice(ODD)}"
        metadata = {"n": number, "word": odd, "date": f"202{number % 3}-0{1 + number % 9}-1{number % 10}"}
        if number % 4:
            metadata["tag"] = chance.sample(["海", "山", "天", 5, None, True], 2)
        found.append(NewItem(item_id, vectors[number], metadata, b"jpg%d" % number if number % 2 else b""))
    return found


@pytest.fixture(scope="module", params=stores.SERVERS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[store.Index, RemoteIndex]]:
    """The same 2,000 items in a folder and on a server, after the same changes."""
    folder: Path = tmp_path_factory.mktemp("index") / "i"
    with stores.kept_by(request.param) as address, open_writer(folder, Manifest(MODEL)) as here:
        with addresses.open_writer(address, Manifest(MODEL)) as there:
            items = hostile(NUM + 100)
            for writer in (here, there):
                for start in range(0, NUM, 500):
                    writer.commit(items[start : start + 500])
                writer.commit(items[NUM:], remove=[one.id for one in items[40:140]])
                writer.commit([NewItem(items[7].id, items[9].vector_D, {"n": 7, "word": "猫"}, b"new")])
                writer.finish()
        yield store.open_index(folder), addresses.open_index(address)  # type: ignore[misc]


def test_no_search_differs_from_that_of_a_folder(both: tuple[store.Index, RemoteIndex]) -> None:
    folder, server = both
    queries = [
        np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32) for seed, count in ((1, 1), (2, 5))
    ]
    queries.append(folder.vector(folder.ids[0])[None])  # of which many have the same score
    asked = [
        {"vectors_QD": one, "k": k, "where": where, "min_score": least, "offset": offset}
        for one, k, where, (least, offset) in itertools.product(queries, (1, 30, 3000), WHERES, ((None, 0), (0.1, 3)))
    ]
    assert len(asked) == 234
    different = [one for one in asked if server.search(**one) != folder.search(**one)]
    assert different == []


def test_no_item_differs_from_that_of_a_folder(both: tuple[store.Index, RemoteIndex]) -> None:
    folder, server = both
    ids = folder.ids
    assert list(server.items()) == list(folder.items())
    assert len(server) == len(ids) == NUM
    assert server.thumbnails(ids) == folder.thumbnails(ids)
    assert server.with_thumbnail([*ids, "absent"]) == folder.with_thumbnail([*ids, "absent"])
    for one in ids[::50]:
        assert one in server
        assert server.vector(one).tobytes() == folder.vector(one).tobytes()
        assert server.metadata(one) == folder.metadata(one)


# --- dropped and built again


def made_again(address: ServerAddress, model: ModelInfo) -> None:
    """The index dropped, and built from other vectors."""
    stores.drop(address)
    with addresses.open_writer(address, Manifest(model)) as opened:
        opened.commit([NewItem("new", np.eye(DIM, dtype=np.float32)[0], {"n": 0}, b"jpg")])


@pytest.fixture(params=stores.SERVERS)
def address(request: pytest.FixtureRequest) -> Iterator[ServerAddress]:
    """An index that is not there yet."""
    with stores.kept_by(request.param) as one:
        yield one


def test_an_index_that_was_made_again_of_another_model_gives_no_answer(address: ServerAddress) -> None:
    query: Any = np.eye(1, DIM, dtype=np.float32)
    with addresses.open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("old", query[0], {"n": 0}, b"jpg")])
        index, served_index = addresses.open_index(address), addresses.open_index(address, is_served=True)
        assert [hit.id for hit in index.search(query, 1)[0]] == ["old"]
    made_again(address, ModelInfo("Other", "4567", DIM))
    sentence = r"was made again .*: its vectors are now of the model Other \(4567\), not of Tiny \(0123\); open"
    for act in (
        lambda: index.search(query, 1),
        lambda: index.search(query, 1, where="n=0"),
        lambda: index.search(query, 5, where="n!=7"),
        lambda: served_index.search(query, 1),
        lambda: index.vector("new"),
        lambda: index.metadata("new"),
        lambda: index.thumbnail("new"),
        lambda: "new" in index,
        lambda: index.ids,
        lambda: len(index),
    ):
        with pytest.raises(StoreError, match=sentence):
            act()
    assert addresses.open_index(address).ids == ["new"]
    stores.drop(address)
    with pytest.raises(StoreError, match="is gone since it was opened"):
        index.search(query, 1)


def test_a_reader_goes_on_with_an_index_that_was_made_again_of_the_same_model(address: ServerAddress) -> None:
    query = np.eye(1, DIM, dtype=np.float32)
    with addresses.open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("old", query[0])])
        index = addresses.open_index(address)
    made_again(address, MODEL)
    assert [hit.id for hit in index.search(query, 1)[0]] == ["new"]
    assert index.thumbnail("new") == b"jpg"


def test_a_writer_does_not_write_into_an_index_that_took_the_place_of_its_own(address: ServerAddress) -> None:
    with addresses.open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("old", np.eye(DIM, dtype=np.float32)[0])])
        stores.drop(address)
        for act in (
            lambda: opened.commit([NewItem("more", np.eye(DIM, dtype=np.float32)[1])]),
            lambda: opened.commit(remove=["old"]),
            lambda: opened.describe(engine=None, source="elsewhere"),
        ):
            with pytest.raises(StoreError, match="is gone since it was opened"):
                act()


@pytest.mark.parametrize("store", stores.REMOTE)
def test_notes_are_kept_once_the_rows_are_there(store: str) -> None:
    with stores.kept_by(store) as address:
        with addresses.open_writer(address, Manifest(MODEL)) as opened:
            assert opened.notes() == b""
            opened.commit(hostile(3), notes="第一批\n".encode())
            opened.commit(hostile(2))
        with addresses.open_writer(address) as opened:
            assert opened.notes() == "第一批\n".encode()
            opened.commit(notes=b"")
        with addresses.open_writer(address) as opened:
            assert opened.notes() == b""
            assert len(opened) == 3
