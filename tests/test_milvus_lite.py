"""Milvus Lite: an index in a folder that pymilvus opens. Its items and searches are tested beside those of servers."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import milvus_server
import numpy as np
import pytest

from cn_clip import cli
from cn_clip.errors import DataError, MissingExtraError, StoreError
from cn_clip.retrieval import addresses
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.milvus_address import Address
from cn_clip.retrieval.schemes import address_of
from cn_clip.retrieval.writer import NewItem

MODEL = ModelInfo("Tiny", "0123", 4)
needs_lite = pytest.mark.milvus


@pytest.fixture
def lite() -> Iterator[Address]:
    """The address of an index that is not there yet."""
    with milvus_server.lite() as address:
        yield address


def write(address: Address, *ids: int) -> None:
    """Some items."""
    with addresses.open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem(one, np.eye(4, dtype=np.float32)[one % 4], {"n": one}) for one in ids])


@pytest.mark.milvus
def test_without_the_package_the_command_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pymilvus")
    monkeypatch.setitem(sys.modules, "milvus_lite.server_manager", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cn-clip-next\[milvus-lite\]'"):
        write(address_of(tmp_path / "photos.db"), 1)  # type: ignore[arg-type]


def test_what_only_reads_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["index", "info"], ["search", "--id", "a"], ["index", "remove", "a"], ["serve"]):
        command = [one for one in args if one != "a"] if args[0] == "search" else args
        place = str(tmp_path / "photos.db")
        with pytest.raises(SystemExit):
            cli.main([*command[:2], place, *args[2:]] if args[0] == "index" else [args[0], place, *args[1:]])
        assert f"{place}: is no index; build one with: cn-clip index build" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_lite
def test_searches_find_what_is_exact_among_many_equal_vectors(lite: Address, tmp_path: Path) -> None:
    vectors = np.random.default_rng(7).normal(size=(1500, 4)).astype(np.float32)
    vectors[::7] = vectors[0]
    folder = tmp_path / "i"
    for place in (folder, lite):
        with addresses.open_writer(place, Manifest(MODEL)) as opened:
            opened.commit([NewItem(n, vector, {"n": n % 3}) for n, vector in enumerate(vectors)])
            opened.finish()
    here, there = addresses.open_index(folder), addresses.open_index(lite)
    for where in (None, "n=1", "n!=1"):
        for k in (1, 7, 60):
            assert there.search(vectors[:20], k, where=where) == here.search(vectors[:20], k, where=where), (where, k)


@needs_lite
def test_two_processes_are_refused_and_the_next_one_goes_on(lite: Address) -> None:
    write(lite, 1, 2, 3)
    script = (
        "import sys; from pathlib import Path; from cn_clip.retrieval import addresses, schemes\n"
        "print(addresses.open_index(schemes.address_of(sys.argv[1])).ids)"
    )

    def other() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", script, str(lite)], capture_output=True, encoding="utf-8", timeout=120
        )

    refused = other()
    assert refused.returncode == 1
    assert "another process has it open, and Milvus Lite is for one at a time" in refused.stderr.splitlines()[-1]
    manager = pytest.importorskip("milvus_lite.server_manager").server_manager_instance
    manager.release_server(str(lite.lite))
    assert other().stdout == "[1, 2, 3]\n"


@needs_lite
def test_a_folder_that_was_made_again_of_another_model_gives_no_answer(lite: Address) -> None:
    write(lite, 1, 2)
    index = addresses.open_index(lite)
    index._rows.call("drop_collection")  # type: ignore[union-attr]
    with addresses.open_writer(lite, Manifest(ModelInfo("Other", "4567", 4))) as opened:
        opened.commit([NewItem(9, np.eye(4, dtype=np.float32)[0])])
    for act in (
        lambda: index.search(np.eye(1, 4, dtype=np.float32), 3),
        lambda: index.vector(9),
        lambda: index.ids,
        lambda: len(index),
    ):
        with pytest.raises(StoreError, match=r"was made again since it was opened: .* of the model Other \(4567\)"):
            act()


@needs_lite
def test_collections_of_others_in_the_same_folder_are_left_alone(lite: Address) -> None:
    import pymilvus

    client = pymilvus.MilvusClient(str(lite))
    client.create_collection("mine", dimension=4)
    write(lite, 1)
    assert sorted(client.list_collections()) == ["cn_clip", "mine"]
    client.drop_collection("cn_clip")
    client.create_collection("cn_clip", dimension=4)
    with pytest.raises(DataError, match="this collection is no index; give another name"):
        addresses.open_index(lite)


@needs_lite
def test_an_index_that_was_copied_is_the_same(lite: Address) -> None:
    write(lite, *range(30))
    manager = pytest.importorskip("milvus_lite.server_manager").server_manager_instance
    manager.release_server(str(lite.lite))
    assert lite.lite is not None
    there = lite.lite.parent / "copy.db"
    shutil.copytree(lite.lite, there)
    copy = addresses.open_index(address_of(there))
    assert copy.ids == addresses.open_index(lite).ids == list(range(30))
    manager.release_server(str(there))
