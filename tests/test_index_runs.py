"""How a run of `cn-clip index build` goes on: what it says first, when it commits, what ends it, what it skips."""

import importlib.metadata
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import photo_files
import pytest
from PIL import Image
from test_index_commands import EMOJI, MODEL, Command, command, name, write_pictures

from cn_clip import cli, progress
from cn_clip.clip import picture_files, pictures
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError, MissingExtraError
from cn_clip.index import ingest, jobs, sources
from cn_clip.index.excludes import Excludes
from cn_clip.index.failures import Failures
from cn_clip.index.pruning import vanished
from cn_clip.language import counted
from cn_clip.retrieval import manifest
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer

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
            f"found {counted(found, 'image')}, {unchanged} unchanged; model Emoji-Tiny (torch, auto, fp32) → {index}"
        )


def test_what_is_computed_is_committed_by_time_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "pictures", range(10))
    monkeypatch.setattr(ingest, "COMMIT_SECONDS", 0.0)
    cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *SMALL])
    done = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if " done" in line]
    assert done == [f"{count} / 10 done" for count in (4, 8, 10, 10)]


def test_a_terminal_shows_a_bar_in_place_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "pictures", range(6))
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for seconds in ("DELAY", "TICK"):
        monkeypatch.setattr(progress, seconds, 0.01)
    args = ["index", "build", str(folder), "--output", str(tmp_path / "i"), *SMALL]
    cli.main(args)
    shown = capsys.readouterr()
    assert " done" not in shown.out
    bar = shown.err.replace("\r", "\n").rstrip().splitlines()[-1]
    assert re.search(r"indexing 100%.* 6/6 .*pictures/s, 6 saved\]", bar)
    write_pictures(folder, range(6, 8))
    cli.main([*args, "--json"])
    assert "%|" not in capsys.readouterr().err


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
    assert "Run the same command again to go on" in out.err
    result = json.loads(out.out)
    # Two batches are kept, and nothing is removed by a run that has not seen all.
    assert (result["encoded"], result["num_items"], result["removed"], result["interrupted"]) == (8, 19, [], True)
    assert len(open_index(index)) == 19
    result = command(*args[:-1])
    assert (result["encoded"], result["unchanged"], result["removed"]) == (4, 18, [name(0)])
    assert result["interrupted"] is False


def test_an_interrupted_run_over_a_folder_that_moved_forgets_nothing_of_the_old_one(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    signal_at_batch: Callable[[int, int], None],
) -> None:
    folder, index = write_pictures(tmp_path / "pictures", range(12)), tmp_path / "i"
    command("index", "build", folder, "--output", index, *SMALL)
    moved = folder.rename(tmp_path / "moved")
    (moved / name(0)).unlink()
    write_pictures(moved, range(12, 24))
    signal_at_batch(signal.SIGINT, 2)
    args = ["index", "build", str(moved), "--output", str(index), *SMALL]
    with pytest.raises(SystemExit, match=r"^130$"):
        cli.main(args)
    capsys.readouterr()
    assert command(*args)["removed"] == [name(0)]


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
    told = "not indexed 6: 2 not decoded, 1 empty, 3 other files"
    assert told in out
    listed = out[out.index("not indexed (3):") :].splitlines()[1:4]
    assert [line.split(":")[0] for line in listed] == ["  z1.jpg", "  z2.jpg", "  z0.png"]


def test_a_format_that_needs_an_extra_is_counted_under_its_name_and_read_once_it_is_there(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pillow_heif")
    folder = pictures_at(tmp_path / "pictures", "a.png")
    (folder / "b.heic").write_bytes(photo_files.heic(Image.new("RGB", (64, 64), "red")))
    (folder / "t.txt").write_bytes(b"")
    args = ["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL]
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "pillow-heif":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    def here(data: bytes, *_: object) -> Image.Image:  # as the process does that decodes it
        try:
            return picture_files.opened_here(data, picture_files.look(data))
        except MissingExtraError as error:
            raise DataError(str(error)) from None

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "opened_elsewhere", here)
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr(importlib.metadata, "version", without)
        cli.main(args)
        told = "not indexed 2: 1 without cn-clip-next[photos], 1 other files"
        out = capsys.readouterr().out
        assert told in out
        assert "pip install 'cn-clip-next[photos]'" in out
        assert command(*args)["remembered"] == 1
    assert command(*args)["num_items"] == 2


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
        f"error: {folder}: nothing was indexed: 1 not decoded, "
        "1 other files; a.jpg: the picture of 10 bytes does not decode"
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
        f"followed 2 links out of the folder (x → {outside / 'x'}, d.png → {outside / 'd.png'})"
    ) in capsys.readouterr().out
    result = command(*args, "--exclude", "x", "--exclude", "d.png")
    assert (result["num_items"], result["links_outside"]) == (3, [])


# --- what failed once


@pytest.fixture
def damaged(tmp_path: Path, command: Command) -> tuple[object, ...]:
    """The command that has built an index of a folder with two pictures and three files that are none."""
    folder = pictures_at(tmp_path / "pictures", "a.png", "b.png")
    for number in range(3):
        (folder / f"bad{number}.jpg").write_bytes(b"no picture" * number)
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    assert command(*args)["remembered"] == 0
    return args


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    names, read_file = list[str](), sources.read_file

    def noted(path: str) -> bytes:
        names.append(Path(path).name)
        return read_file(path)

    monkeypatch.setattr(sources, "read_file", noted)
    return names


def test_what_did_not_decode_is_not_read_again_until_it_changes(
    tmp_path: Path,
    command: Command,
    damaged: tuple[object, ...],
    read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (tmp_path / "i" / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "open_encoder", None)
        result = command(*damaged)
        assert (result["remembered"], result["skipped_by_reason"]) == (3, {"damaged": 2, "empty": 1})
        cli.main([*map(str, damaged)])
    assert "1 empty (3 of them as before, not read again)" in capsys.readouterr().out
    assert read == []
    assert (tmp_path / "i" / "manifest.json").read_bytes() == before
    os.utime(tmp_path / "pictures" / "bad1.jpg", (1, 1))
    assert command(*damaged)["remembered"] == 2
    assert read == ["bad1.jpg"]
    (tmp_path / "pictures" / "bad2.jpg").write_bytes(emoji.png(EMOJI[9]))
    result = command(*damaged)
    assert (result["remembered"], result["encoded"], result["num_items"]) == (2, 1, 3)
    (tmp_path / "pictures" / "bad1.jpg").unlink()
    assert command(*damaged)["remembered"] == 1
    assert list(Failures(next((tmp_path / "i").glob("notes-*")).read_bytes())._of_path) == [
        str(tmp_path / "pictures" / "bad0.jpg")
    ]


def test_retry_and_another_decoder_read_again(
    command: Command, damaged: tuple[object, ...], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [f"bad{number}.jpg" for number in range(3)]
    assert command(*damaged, "--retry")["remembered"] == 0
    assert sorted(read) == bad
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == "Pillow" else version(name))
    read.clear()
    assert command(*damaged)["remembered"] == 0
    assert sorted(read) == bad
    assert command(*damaged)["remembered"] == 3


def test_check_finds_damaged_notes_and_repair_goes_on_without(
    tmp_path: Path, command: Command, damaged: tuple[object, ...], read: list[str]
) -> None:
    notes = next((tmp_path / "i").glob("notes-*"))
    notes.write_bytes(notes.read_bytes().replace(b"empty", b"Empty"))
    found = [{"path": notes.name, "reason": "its bytes have changed"}]
    assert command("index", "check", tmp_path / "i", status=1)["damaged"] == found
    result = command("index", "check", tmp_path / "i", "--repair")
    assert (result["remaining"], result["num_items"]) == ([], 2)
    assert read == []
    assert (command(*damaged)["remembered"], sorted(read)) == (0, ["bad0.jpg", "bad1.jpg", "bad2.jpg"])
    next((tmp_path / "i").glob("notes-*")).unlink()
    assert command(*damaged)["remembered"] == 0
    assert command("index", "check", tmp_path / "i")["damaged"] == []


def test_notes_count_with_the_generation_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(tmp_path / "i", Manifest(ModelInfo("m", "f", 2))) as writer:
        writer.commit(notes=b"1\n")

        def killed(*_: object) -> Manifest:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                writer.commit(notes=b"2\n")
    with open_writer(tmp_path / "i") as writer:
        assert (writer.notes(), len(list((tmp_path / "i").glob("notes-*")))) == (b"1\n", 1)
        writer.commit([NewItem("a", np.ones(2, dtype=np.float32))])
        assert writer.notes() == b"1\n"
        writer.commit(notes=b"")
        assert (writer.notes(), list((tmp_path / "i").glob("notes-*"))) == (b"", [])


def test_notes_of_another_version_are_passed_over() -> None:
    for notes in (b"{}\n[]\n", b"{}\n{}\n", b'{}\n{"path": "/a"}\n', b"\xff\n", b"3\n4\n"):
        failures = Failures(notes)
        assert (len(failures), failures.has_changed, failures.dumped()) == (0, True, b"")


def test_small_pictures_are_passed_over_and_remembered(
    tmp_path: Path, command: Command, read: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png")  # 64 × 64
    for name_, size in (("icon.png", (200, 31)), ("large.png", (80, 200))):
        Image.new("RGB", size, "red").save(folder / name_)
    (folder / "copy.png").write_bytes((folder / "icon.png").read_bytes())
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    result = command(*args, "--min-size", 32)
    reason = "its shorter side has 31 pixels, --min-size asks for 32"
    assert result["skipped"] == [{"id": one, "reason": reason, "kind": "small"} for one in ("copy.png", "icon.png")]
    assert sorted(open_index(tmp_path / "i").ids) == ["a.png", "large.png"]  # type: ignore[type-var]
    read.clear()
    assert command(*args, "--min-size", 32)["remembered"] == 2
    # More is asked for than what is known of the items, then less than what was passed over.
    result = command(*args, "--min-size", 65)
    assert (result["removed"], result["skipped_by_reason"], read) == (["a.png"], {"small": 3}, [])
    result = command(*args, "--min-size", 31)
    assert (result["num_items"], result["skipped"], sorted(read)) == (4, [], ["a.png", "copy.png", "icon.png"])


# --- what is gone


def test_renamed_and_moved_pictures_keep_vector_and_caption(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png", "b.png", "旅行/c.png", "旅行/d.png")
    for copy in ("旅行/copy.png", "other.png"):
        (folder / copy).write_bytes((folder / "旅行/c.png").read_bytes())
    table = tmp_path / "t.csv"
    table.write_text(
        "image,text,group,date\na.png,一,动物,1999\nb.png,二,植物,\n旅行/c.png,三,,\n旅行/copy.png,抄,,\nother.png,别,,\n"
    )
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    command(*args, "--metadata", table)
    before = open_index(tmp_path / "i")
    (folder / "a.png").rename(folder / "renamed.png")
    (folder / "旅行").rename(folder / "2021")
    (folder / "2021" / "d.png").unlink()
    monkeypatch.setattr(TorchBackend, "encode_pixels", None)
    result = command(*args)
    moved = {"renamed.png": "a.png", "2021/c.png": "旅行/c.png", "2021/copy.png": "旅行/copy.png"}
    assert {one["id"]: one["was"] for one in result["renamed"]} == moved
    assert (result["encoded"], result["reused"], sorted(result["removed"])) == (
        0,
        3,
        sorted([*moved.values(), "旅行/d.png"]),
    )
    index = open_index(tmp_path / "i")
    for one, was in moved.items():
        assert index.vector(one).tolist() == before.vector(was).tolist()
        assert index.metadata(one)["caption"] == before.metadata(was)["caption"]
        assert index.metadata(one)["file"] == one.rpartition("/")[2]
    assert (index.metadata("renamed.png")["group"], index.metadata("renamed.png")["date"]) == ("动物", "1999")
    # A row for the new name goes before what the old one had.
    (folder / "b.png").rename(folder / "b2.png")
    table.write_text("image,text\nb2.png,新\nrenamed.png,一\n")
    command(*args, "--metadata", table)
    assert open_index(tmp_path / "i").metadata("b2.png")["caption"] == "新"


def test_a_copy_of_a_picture_that_is_there_takes_no_caption(tmp_path: Path, command: Command) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png", "b.png")
    (tmp_path / "t.csv").write_text("image,text\na.png,一\n")
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    command(*args, "--metadata", tmp_path / "t.csv")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    result = command(*args)
    assert (result["renamed"], result["duplicates"]) == ([], [{"id": "copy.png", "same_as": "a.png"}])
    assert "caption" not in open_index(tmp_path / "i").metadata("copy.png")


@pytest.mark.parametrize(
    ("count", "others", "present", "elsewhere", "expected"),
    [
        (20, 100, (), 0, {"a/b": 20}),
        (19, 100, (), 0, {}),  # fewer than LEAST_ITEMS
        (20, 180, (), 0, {}),  # a tenth is not more than a tenth
        (20, 100, ("a/b/notes.txt",), 0, {}),  # the folder is there
        (20, 100, ("a/notes.txt",), 0, {"a/b": 20}),
        (20, 100, (), 1, {}),  # 19 are lost
        (21, 100, (), 1, {"a/b": 21}),
    ],
)
def test_a_folder_counts_as_vanished_when_it_held_much_and_nothing_is_left(
    count: int, others: int, present: tuple[str, ...], elsewhere: int, expected: dict[str, int]
) -> None:
    gone = [
        *(f"a/b/c/{number}.jpg" for number in range(count // 2)),
        *(f"a/b/{n}.jpg" for n in range(count // 2, count)),
    ]
    there = [f"x/{number}.jpg" for number in range(others)] + ["a/z.jpg", *present]
    found = vanished(gone, there, others + count, is_elsewhere=lambda one: one in gone[:elsewhere])
    assert {folder: len(ids) for folder, ids in found.items()} == expected


def test_a_folder_that_vanished_is_pruned_only_when_asked(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    nas = [f"nas/2021/{number}.png" for number in range(20)]
    folder = pictures_at(tmp_path / "pictures", "a.png", "b.png", *nas)
    args = ["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL]
    command(*args)
    (folder / "nas").rename(tmp_path / "unmounted")
    (folder / "nas").mkdir()  # where it was mounted
    (folder / "b.png").unlink()
    result = command(*args)
    assert (result["missing"], result["removed"]) == ([{"folder": "nas", "items": 20}], ["b.png"])
    cli.main(args)
    assert "nas/ is gone as a whole; its 20 items stay in the index. " in capsys.readouterr().out
    assert len(open_index(tmp_path / "i")) == 21
    assert len(command(*args, "--prune")["removed"]) == 20
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main([*args, "--prune", "--keep-missing"])


def test_a_folder_that_moved_within_the_source_is_not_missed(tmp_path: Path, command: Command) -> None:
    folder = pictures_at(tmp_path / "pictures", "a.png", *(f"old/{number}.png" for number in range(20)))
    args = ("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    command(*args)
    (folder / "old").rename(folder / "new")
    result = command(*args)
    assert (result["missing"], len(result["removed"]), result["num_items"]) == ([], 20, 21)
