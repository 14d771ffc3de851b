"""Folders of feature shards become indexes: from disks and stores, with what lies beside the vectors, by the shard."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_index_commands import Command, command, refusal

from cn_clip.data.storage import Storage, open_storage
from cn_clip.features.store import Manifest, Shard, ShardFolder, begin_shards, write_shard
from cn_clip.retrieval.store import open_index

__all__ = ["command", "refusal"]  # fixtures
pytest.importorskip("pyarrow")

NUM, SIZE, DIMS = 40, 5, 8


def manifest(number: int = NUM, model: str = "aaaa") -> Manifest:
    return Manifest("image_id", {"digest": model}, {"digest": "dddd"}, number, SIZE)


def rows(number: int) -> Any:
    found = np.random.default_rng(number).normal(size=(NUM, DIMS)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def small(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write(folder: Storage, one: Manifest, shard: Shard, *, ids: list[Any] | None = None, seed: int = 0) -> None:
    numbers = range(shard.start, shard.stop)
    columns = {
        "path": [f"s3://photos/{number}.jpg" for number in numbers],
        "caption": [f"图 {number}" if number % 2 else None for number in numbers],
        "year": [2000 + number for number in numbers],
        "mixed": [number if number % 3 else str(number) for number in numbers],
        "thumbnail": [small(number) for number in numbers],
    }
    found = ids or [f"p{number}" for number in numbers]
    write_shard(folder, one, shard, found, rows(seed)[shard.start : shard.stop], columns=columns)


on_disk = pytest.mark.parametrize("place", ["disk"], indirect=True)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shards") if request.param == "disk" else f"memory://{tmp_path}/shards"


@pytest.fixture
def folder(place: str) -> Storage:
    """All shards of `manifest()`."""
    folder = open_storage(place)
    begin_shards(folder, manifest(), overwrite=False)
    for shard in manifest().shards():
        write(folder, manifest(), shard)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the shards whose rows were read."""
    seen, blocks = list[int](), ShardFolder.blocks

    def noting(self: ShardFolder, shard: Shard, **more: Any) -> Iterator[Any]:
        seen.append(shard.number)
        return blocks(self, shard, **more)

    monkeypatch.setattr(ShardFolder, "blocks", noting)
    return seen


def test_an_index_has_what_lies_beside_the_vectors(tmp_path: Path, folder: Storage, command: Command) -> None:
    index = tmp_path / "i"
    said = command("index", "build", folder.name, "--output", str(index), "--commit-every", "7")
    assert (said["added"], said["num_items"]) == (NUM, NUM)
    found = open_index(index)
    assert found.ids == [f"p{number}" for number in range(NUM)]
    np.testing.assert_array_equal(np.stack([found.vector(one) for one in found.ids]), rows(0))
    metadata = dict(found.items())
    assert metadata["p3"] == {
        "path": "s3://photos/3.jpg",
        "caption": "图 3",
        "year": 2003,
        "mixed": "3",
        "source": folder.name,
    }
    assert "caption" not in metadata["p4"]
    assert metadata["p4"]["mixed"] == 4
    assert found.thumbnail("p5") == small(5)
    said = command("index", "build", folder.name, "--output", str(index))
    assert (said["added"], said["unchanged"]) == (0, NUM)


def test_a_build_that_was_killed_goes_on_with_the_shard_where_it_was(
    tmp_path: Path, folder: Storage, command: Command, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, flags = tmp_path / "i", ["--commit-every", "8"]
    killed, blocks = True, ShardFolder.blocks

    def dying(self: ShardFolder, shard: Shard, **more: Any) -> Iterator[Any]:
        if killed and shard.number == 6:
            raise MemoryError("killed")
        return blocks(self, shard, **more)

    monkeypatch.setattr(ShardFolder, "blocks", dying)
    with pytest.raises(SystemExit):
        command("index", "build", folder.name, "--output", str(index), *flags)
    assert len(open_index(index)) == 24  # 3 commits of 8, so 4 shards of 5, and a part of the next
    killed = False
    opened.clear()
    said = command("index", "build", folder.name, "--output", str(index), *flags)
    assert sorted(opened) == [4, 5, 6, 7]
    assert (said["unchanged"], said["added"]) == (24, 16)
    found = open_index(index)
    np.testing.assert_array_equal(np.stack([found.vector(f"p{one}") for one in range(NUM)]), rows(0))
    # What ended remembers nothing: the next run makes the index hold what the shards hold.
    opened.clear()
    command("index", "remove", str(index), "p1")
    assert command("index", "build", folder.name, "--output", str(index))["added"] == 1
    assert len(opened) == NUM // SIZE


@on_disk  # fsspec's memory does not say when a file was written
def test_shards_that_were_written_again_since_are_read_again(
    tmp_path: Path, folder: Storage, command: Command, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, flags = tmp_path / "i", ["--commit-every", "5"]
    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "confirm", lambda self: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(SystemExit):
            command("index", "build", folder.name, "--output", str(index), *flags)
    write(folder, manifest(), manifest().shards()[2], seed=1)
    opened.clear()
    said = command("index", "build", folder.name, "--output", str(index), *flags)
    assert sorted(opened) == list(range(NUM // SIZE))
    assert (said["added"], said["unchanged"]) == (SIZE, NUM - SIZE)
    np.testing.assert_array_equal(open_index(index).vector("p11"), rows(1)[11])


def test_shards_of_two_models_are_refused_before_anything_is_added(
    tmp_path: Path, folder: Storage, command: Command, refusal: Any
) -> None:
    index, other = tmp_path / "i", manifest(model="bbbb")
    file = folder.child("manifest.json")
    now = file.read()
    file.write(other.to_json())
    write(folder, other, other.shards()[5], seed=1)
    file.write(now)
    told = refusal("index", "build", folder.name, "--output", str(index))
    assert "part-00005.parquet: is of another extraction, by its key" in told
    assert not index.exists()


@pytest.mark.parametrize("damage", ["cut short", "twice", "empty", "gone"])
def test_a_faulty_shard_is_one_sentence_and_adds_nothing(
    tmp_path: Path, folder: Storage, refusal: Any, damage: str
) -> None:
    file = folder.child("part-00005.parquet")
    if damage == "gone":
        file.delete()
    else:
        data = {"cut short": file.read()[:-99], "twice": folder.child("part-00004.parquet").read(), "empty": b""}
        file.write(data[damage])
    told = refusal("index", "build", folder.name, "--output", str(tmp_path / "i"))
    assert "part-00005.parquet" in told
    assert "run the extraction again" in told
    assert not (tmp_path / "i").exists()


def test_a_row_that_is_damaged_keeps_the_shards_before_it(
    tmp_path: Path, folder: Storage, command: Command, capsys: pytest.CaptureFixture[str], opened: list[int]
) -> None:
    file = folder.child("part-00005.parquet")
    whole = file.read()
    middle = whole.find(rows(0)[26].tobytes())
    assert middle > 0
    file.write(whole[:middle] + b"\xff" * 4 + whole[middle + 4 :])
    flags = ["index", "build", folder.name, "--output", str(tmp_path / "i"), "--commit-every", "5"]
    with pytest.raises(SystemExit):
        command(*flags)
    assert "part-00005.parquet: cannot be read as Parquet" in capsys.readouterr().err
    assert len(open_index(tmp_path / "i")) == 25
    file.write(whole)
    opened.clear()
    assert command(*flags)["num_items"] == NUM
    assert sorted(opened) == [5, 6, 7]


def test_an_id_of_two_shards_is_told(
    tmp_path: Path, folder: Storage, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, manifest(), manifest().shards()[3], ids=["p0", "p16", "p17", "p18", "p19"])
    for size, told in (
        ("100", "image_id 'p0' comes twice, in two shards"),
        ("5", "1 row came with an id that another"),
    ):
        with pytest.raises(SystemExit):
            command("index", "build", folder.name, "--output", str(tmp_path / size), "--commit-every", size)
        assert told in capsys.readouterr().err


def test_what_is_gone_from_the_shards_goes_from_the_index(tmp_path: Path, place: str, command: Command) -> None:
    folder, index = open_storage(place), str(tmp_path / "i")
    for number in (NUM, 25):
        begin_shards(folder, manifest(number), overwrite=True)
        for shard in manifest(number).shards():
            write(folder, manifest(number), shard)
        said = command("index", "build", folder.name, "--output", index)
    assert sorted(said["removed"]) == sorted(f"p{one}" for one in range(25, NUM))
    assert said["unchanged"] == 25


def test_addresses_that_hold_no_shards_are_told_without_their_keys(tmp_path: Path, refusal: Any) -> None:
    told = refusal("index", "build", "memory://nothing/here", "--output", str(tmp_path / "i"))
    assert "memory://nothing/here: is a folder without manifest.json" in told
    told = refusal("index", "build", "s3://me:hush@bucket/x?endpoint_override=127.0.0.1:9", "--output", str(tmp_path))
    assert "hush" not in told
