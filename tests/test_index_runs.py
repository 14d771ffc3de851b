"""How a run of `cn-clip index build` goes on: what it says first, when it commits, what ends it, what it skips."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_index_commands import EMOJI, MODEL, Command, command, name, write_pictures

from cn_clip import cli
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError, MissingExtraError
from cn_clip.index import ingest, skips
from cn_clip.index.excludes import Excludes
from cn_clip.retrieval.store import open_index

__all__ = ["command"]

SMALL = (*MODEL, "--batch-size", "4", "--num-workers", "0")


def test_the_first_line_says_what_there_is_to_do(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, index = write_pictures(tmp_path / "pictures", range(3)), tmp_path / "i"
    for found, unchanged in ((3, 0), (5, 3)):
        write_pictures(folder, range(unchanged, found))
        cli.main(["index", "build", str(folder), "--output", str(index), *MODEL])
        assert capsys.readouterr().out.splitlines()[0] == (
            f"找到 {found} 张图片，{unchanged} 张未变 / found {found} pictures, {unchanged} unchanged; "
            f"模型 / model Emoji-Tiny (torch, auto, fp32) → {index}"
        )


def test_what_is_computed_is_committed_by_time_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "pictures", range(10))
    monkeypatch.setattr(ingest, "COMMIT_SECONDS", 0.0)
    cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *SMALL])
    done = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("已完成")]
    assert done == [f"已完成 / done {count} / 10" for count in (4, 8, 10, 10)]


@pytest.fixture
def signal_at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Has a signal sent while the batch of that number, from 1, is computed."""

    def arm(number: int, at: int) -> None:
        encode, calls = TorchBackend.encode_pixels, []

        def with_signal(backend: TorchBackend, pixels: Any) -> Any:
            calls.append(len(pixels))
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return encode(backend, pixels)

        monkeypatch.setattr(TorchBackend, "encode_pixels", with_signal)

    return arm


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_it_has_computed_and_goes_on(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    signal_at_batch: Callable[[int, int], None],
    number: int,
    status: int,
) -> None:
    folder, index = write_pictures(tmp_path / "pictures", range(12)), tmp_path / "i"
    gone = tmp_path / "gone.png"
    (folder / name(11)).rename(gone)
    command("index", "build", folder, "--output", index, *SMALL)
    write_pictures(folder, range(12, 24))
    (folder / name(0)).unlink()
    signal_at_batch(number, 3)
    args = ["index", "build", str(folder), "--output", str(index), *SMALL, "--json"]
    with pytest.raises(SystemExit, match=f"^{status}$"):
        cli.main(args)
    out = capsys.readouterr()
    assert "再运行同一条命令就接着做 / interrupted, with all kept that was done; the same command goes on" in out.err
    result = json.loads(out.out)
    # Two batches are kept, and nothing is removed by a run that has not seen all.
    assert (result["encoded"], result["num_items"], result["removed"], result["interrupted"]) == (8, 19, [], True)
    assert len(open_index(index)) == 19
    result = command(*args[:-1])
    assert (result["encoded"], result["unchanged"], result["removed"]) == (4, 18, [name(0)])
    assert result["interrupted"] is False


# --- what is passed over


def pictures_at(folder: Path, *paths: str) -> Path:
    """Pictures of different bytes at these places."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(emoji.png(EMOJI[number]))
    return folder


def test_names_that_systems_make_and_those_asked_for_are_passed_over(tmp_path: Path, command: Command) -> None:
    folder = pictures_at(
        tmp_path / "pictures",
        *("a.png", "旅行/b.png", "旅行/@eaDir/b.png", "旅行/.thumbnails/c.png", "#Recycle/d.png", "x/__macosx/e.png"),
        *("System Volume Information/f.png", "$RECYCLE.BIN/g.png", "web/node_modules/h.png", "旅行/草稿/i.png"),
        *("草稿/j.png", "old/IMG_1.PNG"),
    )
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    result = command(*args, "--exclude", "旅行/草稿", "--exclude", "img_*")
    assert sorted(map(str, open_index(tmp_path / "i").ids)) == ["a.png", "旅行/b.png", "草稿/j.png"]
    passed = ["#Recycle", "$RECYCLE.BIN", "System Volume Information", "old/IMG_1.PNG", "web/node_modules"]
    passed += ["x/__macosx", "旅行/@eaDir", "旅行/草稿"]
    assert sorted(one["id"] for one in result["skipped"]) == passed
    assert result["skipped_by_reason"] == {"excluded": 8}
    # What is excluded later goes, too.
    result = command(*args, "--exclude", "旅行/", "--exclude", "img_*")
    assert result["removed"] == ["旅行/b.png"]


@pytest.mark.parametrize(
    ("glob", "path", "is_covered"),
    [
        ("*.gif", "a/b/C.GIF", True),
        ("*.gif", "a.gif.png", False),
        ("草稿/", "a/草稿/b.png", True),
        ("a/*/c", "a/b/c/d.png", True),
        ("a/*/c", "x/a/b/c", False),
        ("/a", "a/b.png", True),
        ("/a", "b/a/c.png", False),
        ("./a/b", "a/b/c.png", True),
        ("IMG_[0-9].jpg", "IMG_7.jpg", True),
        ("", "a.png", None),
        ("/", "a.png", None),
    ],
)
def test_a_pattern_covers_names_in_any_folder_and_paths_from_the_source_on(
    glob: str, path: str, is_covered: bool | None
) -> None:
    if is_covered is None:
        with pytest.raises(ConfigError, match=r"--exclude .*: expected a name or a path"):
            Excludes([glob])
    else:
        assert Excludes([glob]).covers(path) is is_covered


def test_skips_are_counted_by_reason_failures_first(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png")
    for name_ in ("1.txt", "2.doc", "3.xls"):
        (folder / name_).write_bytes(b"")
    (folder / "z1.jpg").write_bytes(b"no picture")
    (folder / "z2.jpg").write_bytes("加密".encode() * 100)
    (folder / "z0.png").write_bytes(b"")
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    assert command(*args)["skipped_by_reason"] == {"damaged": 2, "empty": 1, "other": 3}
    cli.main([*map(str, args)])
    out = capsys.readouterr().out
    told = "未收录 / not indexed 6: 2 不能解码 / not decoded, 1 空文件 / empty, 3 其他文件 / other files"
    assert told in out
    listed = out[out.index("未收录 / not indexed (3):") :].splitlines()[1:4]
    assert [line.split(":")[0] for line in listed] == ["  z1.jpg", "  z2.jpg", "  z0.png"]


def test_a_format_that_needs_an_extra_is_counted_under_its_name() -> None:
    try:
        raise MissingExtraError("HEIC needs the package `pillow_heif`; install it with: pip install 'cn_clip[photos]'")
    except MissingExtraError as cause:
        error = DataError("the picture of 9 bytes is not decoded")
        error.__cause__ = cause
    kind = skips.kind_of(error, num_bytes=9)
    skipped = [skips.Skipped("t.txt", "", skips.OTHER), skips.Skipped("a.heic", str(error), kind)]
    assert skips.counts(skipped) == {"without cn_clip[photos]": 1, "other": 1}
    assert skips.told(skipped) == "1 缺 cn_clip[photos] / without cn_clip[photos], 1 其他文件 / other files"


def test_nothing_indexed_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no picture")
    (folder / "b.txt").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL, "--json"])
    out = capsys.readouterr()
    assert json.loads(out.out)["skipped_by_reason"] == {"damaged": 1, "other": 1}
    assert out.err.splitlines()[-1].startswith(
        f"错误 / error: {folder}: 一张也没有收录 / nothing was indexed: 1 不能解码 / not decoded, "
        "1 其他文件 / other files; a.jpg: the picture of 10 bytes does not decode"
    )


def test_links_that_leave_the_folder_are_followed_and_told(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png", "d/b.png")
    outside = pictures_at(tmp_path / "outside", "x/c.png", "d.png")
    (folder / "inside").symlink_to(folder / "d" / "b.png")
    (folder / "x").symlink_to(outside / "x")
    (folder / "d.png").symlink_to(outside / "d.png")
    args = ["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL]
    result = command(*args)
    links = [{"id": "x", "target": str(outside / "x")}, {"id": "d.png", "target": str(outside / "d.png")}]
    assert (result["num_items"], result["links_outside"]) == (5, links)
    cli.main(args)
    assert (
        "有 2 个链接通向文件夹之外，照样收录 / links that lead out of the folder and are followed: 2 "
        f"(x → {outside / 'x'}, d.png → {outside / 'd.png'})"
    ) in capsys.readouterr().out
    result = command(*args, "--exclude", "x", "--exclude", "d.png")
    assert (result["num_items"], result["links_outside"]) == (3, [])
