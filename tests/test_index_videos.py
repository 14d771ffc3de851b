"""Videos and Live Photos in an index: what becomes an item, what is not read again, what faulty ones say."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from video_files import BLUE, GREEN, RED, write_sound, write_video

from cn_clip import cli
from cn_clip.data import videos
from cn_clip.demo import emoji
from cn_clip.index import clips
from cn_clip.index.live_photos import other_halves
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import IndexWriter

MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")
EMOJI = emoji.load("twemoji")
Build = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture, a video of three scenes, and one in a folder below."""
    path = tmp_path / "pictures"
    path.mkdir()
    (path / "a.png").write_bytes(emoji.png(EMOJI[0]))
    write_video(path / "b.mp4", [RED, GREEN, GREEN, BLUE])
    write_video(path / "旅行" / "c d.MOV", [RED], rotation=90)
    return path


@pytest.fixture
def build(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Build:
    """Builds, and returns what --json prints."""

    def run(*more: object) -> dict[str, Any]:
        cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL, *map(str, more), "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are read from now on."""
    found = list[str]()

    def noting(path: Path, every: float) -> Any:
        found.append(path.name)
        return videos.frames(path, every)

    monkeypatch.setattr(clips, "frames", noting)
    return found


FRAMES = ["b.mp4#t=0", "b.mp4#t=1", "b.mp4#t=3", "旅行/c d.MOV#t=0"]


def test_frames_are_items_with_their_time_and_what_is_known_of_the_video(build: Build, tmp_path: Path) -> None:
    result = build()
    assert (result["num_items"], result["encoded"], result["videos"], result["frames"]) == (5, 1, 2, 4)
    index = open_index(tmp_path / "i")
    assert sorted(map(str, index.ids)) == ["a.png", *FRAMES]
    path = tmp_path / "pictures" / "b.mp4"
    assert index.metadata("b.mp4#t=1") == {
        "source": str(tmp_path / "pictures"),
        "path": str(path),
        "size": path.stat().st_size,
        "mtime_ns": path.stat().st_mtime_ns,
        "folder": "",
        "file": "b.mp4",
        "width": 64,
        "height": 48,
        "kind": "video",
        "time": 1.0,
        "video": "b.mp4",
        "video_every": 10.0,
    }
    turned = index.metadata("旅行/c d.MOV#t=0")
    assert (turned["folder"], turned["video"], turned["width"], turned["height"]) == ("旅行", "旅行/c d.MOV", 48, 64)
    assert all((index.thumbnail(one) or b"").startswith(b"\xff\xd8\xff") for one in FRAMES)


def test_a_search_names_the_second_and_its_json_the_video(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build()
    search = ["search", str(tmp_path / "i"), "--id", "b.mp4#t=0", "--k", "1", *MODEL]
    cli.main(search)
    assert "  b.mp4#t=" in capsys.readouterr().out
    cli.main([*search, "--where", "kind=video time>=2", "--json"])
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert (hit["id"], hit["metadata"]["time"], hit["metadata"]["video"]) == ("b.mp4#t=3", 3.0, "b.mp4")


def test_videos_that_are_as_they_were_are_not_read_again(build: Build, reads: list[str], folder: Path) -> None:
    build()
    assert reads == ["b.mp4", "c d.MOV"]
    result = build()
    assert (result["unchanged"], result["videos"], result["num_items"], len(reads)) == (3, 0, 5, 2)
    os.utime(folder / "b.mp4", (1, 1))
    assert (build()["videos"], reads[2:]) == (1, ["b.mp4"])


def test_another_interval_reads_videos_again_and_stays(build: Build, reads: list[str], tmp_path: Path) -> None:
    build()
    assert build("--video-every", 1)["videos"] == 2
    assert sorted(open_index(tmp_path / "i").ids, key=str)[1:5] == ["b.mp4#t=0", "b.mp4#t=1", "b.mp4#t=2", "b.mp4#t=3"]
    del reads[:]
    assert (build()["unchanged"], reads) == (3, [])


def test_a_changed_video_loses_the_frames_it_no_longer_has_and_a_removed_one_all(
    build: Build, folder: Path, tmp_path: Path
) -> None:
    build()
    write_video(folder / "b.mp4", [RED, RED, BLUE])
    assert build()["num_items"] == 4
    assert {"b.mp4#t=0", "b.mp4#t=2"} < set(open_index(tmp_path / "i").ids)
    (folder / "b.mp4").unlink()
    result = build()
    assert (sorted(result["removed"]), result["num_items"]) == (["b.mp4#t=0", "b.mp4#t=2"], 2)


def test_without_videos_if_asked(build: Build) -> None:
    build()
    result = build("--video-every", 0)
    assert (result["num_items"], result["skipped_by_reason"]) == (1, {"video": 2})
    assert sorted(result["removed"]) == FRAMES


def test_a_run_that_is_killed_within_a_video_reads_it_again(
    build: Build, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def killed(path: Path, every: float) -> Any:
        found = videos.frames(path, every)
        yield next(found)
        yield next(found)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(clips, "frames", killed)
        with pytest.raises(KilledError):
            build("--batch-size", 1, "--commit-every", 1)
    assert sorted(open_index(tmp_path / "i").ids, key=str) == ["a.png", "b.mp4#t=1"]
    assert (build()["num_items"], reads) == (5, ["b.mp4", "c d.MOV"])


def test_a_video_whose_disk_goes_away_while_it_is_read_is_read_again(
    build: Build, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(path: Path, every: float) -> Any:
        yield next(videos.frames(path, every))
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(clips, "frames", away)
        assert build()["skipped_by_reason"] == {"unreadable": 2}
    result = build()
    assert (reads, result["num_items"], result["skipped"]) == (["b.mp4", "c d.MOV"], 5, [])


def test_the_frames_of_a_video_that_a_link_leads_to_stay_while_its_disk_is_away(
    build: Build, folder: Path, tmp_path: Path
) -> None:
    (folder / "b.mp4").rename(tmp_path / "disk.mp4")
    (folder / "b.mp4").symlink_to(tmp_path / "disk.mp4")
    build()
    (tmp_path / "disk.mp4").rename(tmp_path / "away")
    result = build()
    assert (result["skipped_by_reason"], result["removed"]) == ({"unreadable": 1}, [])


def test_a_moved_folder_and_a_table_cost_no_reading(
    build: Build, reads: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build()
    table = tmp_path / "t.csv"
    table.write_text("image,text,group\nb.mp4,跳舞,a\n旅行/c d.MOV,海,b\n")
    del reads[:]
    sizes, commit = list[int](), IndexWriter.commit

    def counting(writer: IndexWriter, items: Any = (), *given: Any, **more: Any) -> None:
        sizes.append(len(items))
        commit(writer, items, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IndexWriter, "commit", counting)
        result = build("--metadata", table, "--commit-every", 1)
    assert (result["reused"], result["unmatched_rows"]) == (2, 0)
    assert max(sizes) == 3  # of one video, not of all
    index = open_index(tmp_path / "i")
    for frame in FRAMES[:3]:
        assert (index.metadata(frame)["caption"], index.metadata(frame)["group"]) == ("跳舞", "a")
    folder.rename(tmp_path / "elsewhere")
    cli.main(["index", "build", str(tmp_path / "elsewhere"), "--output", str(tmp_path / "i"), *MODEL, "--json"])
    assert json.loads(capsys.readouterr().out)["num_items"] == 5
    assert open_index(tmp_path / "i").metadata("b.mp4#t=1")["path"] == str(tmp_path / "elsewhere" / "b.mp4")
    assert reads == []


def test_faulty_videos_are_counted_by_reason_and_remembered(build: Build, folder: Path, reads: list[str]) -> None:
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:700])
    (folder / "empty.mov").write_bytes(b"")
    write_sound(folder / "sound.m4a").rename(folder / "sound.mp4")
    for _ in range(2):
        result = build()
        assert result["skipped_by_reason"] == {"damaged": 1, "empty": 1, "no_pictures": 1}
        assert {one["id"]: one["reason"] for one in result["skipped"]}["sound.mp4"] == "holds sound but no pictures"
    assert len(reads) == 5  # of which three are not read the second time


def test_without_av_pictures_are_indexed_and_videos_wait(
    build: Build, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        result = build()
        assert (result["num_items"], result["skipped_by_reason"]) == (1, {"without cn-clip-next[video]": 2})
        assert "pip install 'cn-clip-next[video]'" in result["skipped"][0]["reason"]
    assert build()["num_items"] == 5


def test_a_video_goes_into_an_index_by_itself(build: Build, folder: Path, tmp_path: Path) -> None:
    build("--video-every", 0)
    cli.main(["index", "add", str(tmp_path / "i"), str(folder / "b.mp4"), "--id-prefix", "x/", *MODEL])
    assert {"x/b.mp4#t=0", "x/b.mp4#t=1", "x/b.mp4#t=3"} < set(open_index(tmp_path / "i").ids)
    assert open_index(tmp_path / "i").metadata("x/b.mp4#t=1")["video"] == "b.mp4"


# --- Live Photos


def test_the_other_half_lies_beside_the_still_under_the_same_name() -> None:
    stills = ["a/IMG_1.HEIC", "a/IMG_2.jpg", "a/IMG_3.png", "b/IMG_1.HEIC", "c/d.jpg"]
    movies = {"a/img_1.MOV": 3 << 20, "a/IMG_2.mov": 9, "a/IMG_3.mov": 9, "a/IMG_2.mp4": 9, "c/d.mov": 99 << 20}
    assert other_halves(stills, movies) == {"a/IMG_1.HEIC": "a/img_1.MOV", "a/IMG_2.jpg": "a/IMG_2.mov"}
    assert other_halves(stills, {}) == {}


def test_the_other_half_of_a_live_photo_is_counted_and_named_and_gives_no_frames(
    build: Build, folder: Path, tmp_path: Path
) -> None:
    (folder / "IMG_1.JPG").write_bytes(emoji.png(EMOJI[1]))
    write_video(folder / "img_1.mov", [RED])
    result = build()
    assert (result["num_items"], result["skipped_by_reason"]) == (6, {"live": 1})
    assert open_index(tmp_path / "i").metadata("IMG_1.JPG")["live"] == "img_1.mov"
    (folder / "img_1.mov").unlink()
    assert build()["reused"] == 1
    assert "live" not in open_index(tmp_path / "i").metadata("IMG_1.JPG")
    write_video(folder / "img_1.mov", [RED])
    (folder / "IMG_1.JPG").unlink()
    assert (build()["num_items"], "img_1.mov#t=0" in open_index(tmp_path / "i")) == (6, True)
