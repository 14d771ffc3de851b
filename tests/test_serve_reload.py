"""Indexes that change while they are served, and several of them with a model each."""

import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import numpy as np
import pytest
from serving import WatchedBackend, served_all, wait_until

from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.errors import ConfigError
from cn_clip.retrieval import manifest
from cn_clip.retrieval.manifest import Manifest, ModelInfo, PictureFacts
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve import collections, opening
from cn_clip.serve.batching import Metrics
from cn_clip.serve.collections import Collection, Collections, Opened
from cn_clip.serve.limits import Limits
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import RefusalError


def runner(name: str = "tiny") -> Runner:
    return Runner(name, lambda: Encoder(WatchedBackend()), Limits(max_wait_ms=0), Metrics())


def write(folder: Path, *, add: str = "", remove: str = "", fingerprint: str = "one", **facts: object) -> Path:
    """Adds items, each called by a character, and removes some; the index is made where there is none."""
    create = Manifest(ModelInfo("tiny", fingerprint, 4), **facts)  # type: ignore[arg-type]
    with open_writer(folder, create) as writer:
        vector = np.array([1, 0, 0, 0], dtype=np.float32)
        writer.commit([NewItem(one, vector, {"source": "/nowhere"}, b"\xff\xd8") for one in add], remove=list(remove))
    return folder


def collection(folder: Path) -> Collection:
    return Collection(Opened(folder.stem, open_index(folder), runner()))


def ids(opened: Opened) -> str:
    return "".join(map(str, opened.index.ids))


# --- one index


def test_a_change_is_taken_and_a_request_keeps_what_it_began_with(tmp_path: Path) -> None:
    served = collection(write(tmp_path / "a.index", add="abc"))
    before = served.now
    served.refresh()
    assert served.now is before  # nothing has changed
    write(tmp_path / "a.index", add="d", remove="a")
    served.refresh()
    assert (ids(before), ids(served.now)) == ("abc", "bcd")
    assert before.index.thumbnail("a") == b"\xff\xd8"
    assert served.now.index.thumbnail("a") is None


def test_an_index_that_is_built_anew_is_taken(tmp_path: Path) -> None:
    served = collection(write(tmp_path / "a.index", add="abc"))
    shutil.rmtree(tmp_path / "a.index")
    write(tmp_path / "a.index", add="x")  # of the same generation as the one before
    served.refresh()
    assert ids(served.now) == "x"


@pytest.mark.parametrize("fault", ["damaged", "gone", "other model", "other pictures"])
def test_what_cannot_be_taken_changes_nothing_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder = write(tmp_path / "a.index", add="abc")
    served = collection(folder)
    served.refresh()
    if fault == "damaged":
        write(folder, add="d")
        newest = folder / manifest.read(folder).segments[-1].name / "items.jsonl"
        newest.write_bytes(newest.read_bytes()[:-2])
    else:
        shutil.rmtree(folder)
    if fault == "other model":
        write(folder, add="x", fingerprint="two")
    if fault == "other pictures":
        write(folder, add="x", pictures=PictureFacts(upright=True))
    with caplog.at_level(logging.INFO):
        for asked in (False, False, True):
            served.refresh(is_asked=asked)
    assert ids(served.now) == "abc"
    (line,) = [one.message for one in caplog.records]
    assert line.endswith("; the index 'a' is served as it was")
    expected = {"damaged": "items.jsonl", "gone": "is no index", "other model": "(two), not of tiny (one)"}
    assert expected.get(fault, "seen in another way") in line
    if fault in ("damaged", "gone"):  # and once it is whole again, it is taken
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, add="y")
        served.refresh()
        assert ids(served.now) == "y"


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = collection(write(tmp_path / "a.index", add="abc"))
    write(tmp_path / "a.index", add="d")
    with monkeypatch.context() as patched:
        patched.setattr(collections, "open_index", lambda *_, **__: (_ for _ in ()).throw(OSError("stale handle")))
        served.refresh()
    assert ids(served.now) == "abc"
    served.refresh()
    assert ids(served.now) == "abcd"


# --- several, over HTTP


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a.index", add="abc"), write(tmp_path / "b.index", add="xy", fingerprint="two")]


@pytest.fixture
def client(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(collections, "LOOK_SECONDS", 0.02)
    runners = [runner("one"), runner("two")]
    opened = [
        Opened(path.stem, open_index(path), its, is_first=path.stem == "a")
        for path, its in zip(folders, runners, strict=True)
    ]
    with (
        served_all(runners, Collections(opened)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def test_what_is_removed_while_serving_is_gone_everywhere(client: httpx.Client, folders: list[Path]) -> None:
    def found() -> list[str]:
        answer = client.post("/v1/search", json={"query": {"text": "猫"}})
        assert answer.status_code == 200
        return [hit["id"] for hit in answer.json()["data"]]

    assert found() == ["a", "b", "c"]
    write(folders[0], remove="b")
    wait_until(lambda: found() == ["a", "c"])
    assert client.get("/v1/index/items").json()["total"] == 2
    assert client.get("/v1/index/thumbnails/b").status_code == 404
    assert client.post("/v1/search", json={"query": {"id": "b"}}).status_code == 404
    assert client.get("/v1/index").json()["data"][0]["generation"] > 2


def test_each_index_is_searched_with_its_own_model(client: httpx.Client) -> None:
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["one", "two"]
    cards = client.get("/v1/index").json()["data"]
    assert [(one["name"], one["model"], one["count"]) for one in cards] == [("a", "one", 3), ("b", "two", 2)]
    for asked in ({"index": "b"}, {"model": "two"}):
        answer = client.post("/v1/search", json={"query": "猫", **asked}).json()
        assert (answer["index"], answer["model"]) == ("b", "two")
        assert answer["data"][0]["thumbnail"] == "/v1/index/thumbnails/x?index=b"
        assert client.get(answer["data"][0]["thumbnail"]).status_code == 200
    wrong = client.post("/v1/search", json={"query": "猫", "index": "b", "model": "one"}).json()["error"]
    assert wrong["message"] == "model: the index 'b' is of the model 'two', not 'one'"
    vectors = client.post("/v1/embeddings", json={"model": "two", "input": "猫"}).json()
    assert vectors["model"] == "two"
    assert "only 'one', 'two'" in client.get("/v1/models/three").json()["error"]["message"]


def test_without_a_name_the_first_index_is_meant(folders: list[Path]) -> None:
    named = Collections([Opened(path.stem, open_index(path), runner(path.stem)) for path in folders])
    assert [named.get(None).name, named.get("b").name, named.get(None, "b").name] == ["a", "b", "b"]
    with pytest.raises(RefusalError, match="cn-clip serve INDEX"):
        Collections().get(None)


# --- from the command


def opened(*addresses: Path, model: str | None = None, name: str | None = None) -> tuple[list[Runner], Collections]:
    return opening.open_all(
        list(map(str, addresses)), chosen=Choice("x"), limits=Limits(), model=model, name=name, metrics=Metrics()
    )


def test_indexes_of_one_model_share_it(folders: list[Path], tmp_path: Path) -> None:
    third = write(tmp_path / "c.index", add="q")
    runners, named = opened(*folders, third)
    assert [one.name for one in runners] == ["tiny", "tiny-2"]  # two models whose files are called alike
    assert [(one.name, one.runner.name, one.is_first) for one in named] == [
        ("a", "tiny", True),
        ("b", "tiny-2", False),
        ("c", "tiny", False),
    ]
    runners, _ = opened(*folders, model="other.pt")  # which is compared with each when it is open
    assert [one.name for one in runners] == ["other"]
    assert [one.name for one in opened()[0]] == ["ViT-B-16"]


def test_names_that_would_mean_two_things_are_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another index is called 'a' too"):
        opened(folders[0], write(tmp_path / "other" / "a.index", add="a"))
    with pytest.raises(ConfigError, match="--name emoji: the indexes have 2 models"):
        opened(*folders, name="emoji")


def test_a_signal_may_come_while_one_is_being_handled() -> None:
    several = Collections()

    def interrupted(frame: FrameType, event: str, _: Any) -> Any:
        several.look()
        return interrupted

    def handle() -> None:
        sys.settrace(interrupted)
        several.look()
        sys.settrace(None)

    thread = threading.Thread(target=handle, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
