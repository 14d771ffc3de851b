"""`cn-clip index …`: what is indexed, what is only computed once, what survives a kill, what is refused."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_python
from dataset_files import tsv_line
from PIL import Image

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.transforms import ImageTransform
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.demo import emoji
from cn_clip.errors import NotFiniteError
from cn_clip.features.files import write_features
from cn_clip.index import jobs, sources
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, Snapshot, open_index
from cn_clip.retrieval.writer import IndexWriter, NewItem, open_writer

MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")
EMOJI = emoji.load("twemoji")

Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process with --json and returns what it prints."""

    def run(*args: object, status: int = 0) -> dict[str, Any]:
        if status:
            with pytest.raises(SystemExit, match=f"^{status}$"):
                cli.main([*map(str, args), "--json"])
        else:
            cli.main([*map(str, args), "--json"])
        out = capsys.readouterr()
        result: dict[str, Any] = json.loads(out.out) if out.out else {"error": out.err}
        return result

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails, and returns the one line it says."""

    def run(*args: object, status: int = 1) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, args)])
        out = capsys.readouterr()
        # Before the work it may have said what there is to do, and how pictures are decoded.
        assert stop.value.code == status
        assert all(line.startswith(("found ", "JPEGs much larger than ")) for line in out.out.splitlines())
        assert out.err.startswith("error: ")
        assert out.err.count("\n") == 1
        return out.err.removeprefix("error: ").strip()

    return run


def write_pictures(folder: Path, numbers: Sequence[int]) -> Path:
    """emoji NNN.png of the places given, in two folders."""
    for number in numbers:
        path = folder / f"d{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(emoji.png(EMOJI[number]))
    return folder


def name(number: int) -> str:
    """The id of a picture of `write_pictures`."""
    return f"d{number % 2}/{number:03d}.png"


@pytest.fixture
def built(tmp_path: Path, command: Command) -> Path:
    """An index of 12 pictures, in segments of 5."""
    write_pictures(tmp_path / "pictures", range(12))
    command("index", "build", tmp_path / "pictures", "--output", tmp_path / "i", "--commit-every", 5, *MODEL)
    return tmp_path / "i"


def vectors(index: Index) -> dict[Any, list[float]]:
    """The vectors by id."""
    return {item_id: index.vector(item_id).tolist() for item_id in index.ids}


def assert_same(index: Index, other: Index) -> None:
    """The same items; vectors may differ by the rounding of batches of other sizes."""
    assert sorted(index.ids) == sorted(other.ids)
    for item_id in index.ids:
        np.testing.assert_allclose(index.vector(item_id), other.vector(item_id), atol=1e-5)
        assert index.thumbnail(item_id) == other.thumbnail(item_id)


# --- what is built


def test_items_are_the_pictures_with_their_vectors_metadata_and_thumbnails(built: Path, tmp_path: Path) -> None:
    index = open_index(built)
    assert index.ids == [*map(name, range(0, 12, 2)), *map(name, range(1, 12, 2))]
    expected = Encoder("Emoji-Tiny").encode_images([tmp_path / "pictures" / one for one in index.ids])  # type: ignore[operator]
    np.testing.assert_allclose([index.vector(one) for one in index.ids], expected, atol=1e-5)
    path = tmp_path / "pictures" / name(3)
    metadata = index.metadata(name(3))
    assert metadata.pop("digest")
    assert metadata == {
        "source": str(tmp_path / "pictures"),
        "path": str(path),
        "size": path.stat().st_size,
        "mtime_ns": path.stat().st_mtime_ns,
        "folder": "d1",
        "file": "003.png",
        "width": 64,
        "height": 64,
    }
    small = index.thumbnail(name(3))
    assert small is not None
    assert small.startswith(b"\xff\xd8\xff")
    assert (index.model.name, index.model.embed_dim, len(index.model.fingerprint)) == ("Emoji-Tiny", 256, 16)


def test_what_is_no_picture_is_passed_over_and_listed(tmp_path: Path, command: Command) -> None:
    folder = write_pictures(tmp_path / "pictures", range(3))
    whole = (folder / name(0)).read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes("你好".encode())
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(whole)
    (folder / "copy.png").write_bytes(whole)
    (folder / "no-suffix").write_bytes(emoji.png(EMOJI[3]))
    (folder / "gone.png").symlink_to("absent.png")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    result = command("index", "build", folder, "--output", tmp_path / "i", *MODEL)
    assert {one["id"]: re.sub(r"\(.*?\)|\d+", "", one["reason"]) for one in result["skipped"]} == {
        "cut.png": "the picture of  bytes does not decode ",
        "empty.png": "the picture is empty ",
        "gone.png": "cannot be read ",
        "notes.txt": "not a picture by its name",
        "pipe.png": "not a regular file",
        "text.jpg": "the picture of  bytes does not decode ",
    }
    assert result["duplicates"] == [{"id": name(0), "same_as": "copy.png"}]
    assert (result["encoded"], result["reused"], result["num_items"]) == (4, 1, 5)
    index = open_index(tmp_path / "i")
    assert sorted(map(str, index.ids)) == ["copy.png", *map(name, (0, 2, 1)), "no-suffix"]
    assert index.vector("copy.png").tolist() == index.vector(name(0)).tolist()


def test_names_in_any_encoding_are_kept_and_spelled_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pictures(tmp_path / "pictures", [1])
    raw = os.fsencode(folder) + b"/\xc3\x28 \n\xe6.png"
    with open(raw, "wb") as stream:
        stream.write(emoji.png(EMOJI[0]))
    with open(raw + b".jpg", "wb"):
        pass
    cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL])
    assert "bytes:%C3( %0A%E6.png.jpg: the picture is empty" in capsys.readouterr().out
    item_id = "bytes:%C3( %0A%E6.png"
    assert item_id in open_index(tmp_path / "i")
    cli.main(["search", str(tmp_path / "i"), "--id", name(1), "--json"])
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == item_id
    cli.main(["search", str(tmp_path / "i"), "--id", name(1)])
    assert item_id in capsys.readouterr().out


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_engines_and_vector_types_find_the_same(tmp_path: Path, command: Command, vector_type: str) -> None:
    folder = write_pictures(tmp_path / "pictures", range(6))
    results = []
    for engine in ("exact", "usearch"):
        output = tmp_path / engine
        args = ("--output", output, "--engine", engine, "--vector-type", vector_type)
        command("index", "build", folder, *args, *MODEL)
        assert open_index(output).manifest.engine == engine
        results.append(command("search", output, "--id", name(2))["hits"])
    assert results[0] == results[1]
    assert len(results[0]) == 5


# --- a second run


def test_second_run_opens_no_model_and_changes_nothing(
    built: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr(jobs, "open_encoder", None)
    result = command("index", "build", tmp_path / "pictures", "--output", built, *MODEL)
    assert (result["unchanged"], result["encoded"], result["reused"], result["num_items"]) == (12, 0, 0, 12)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_second_run_computes_only_what_is_new(built: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "pictures"
    (folder / name(0)).write_bytes(emoji.png(EMOJI[50]))  # changed
    (folder / name(1)).rename(folder / "renamed.png")
    (folder / name(2)).unlink()
    os.utime(folder / name(3), (1, 1))  # touched
    write_pictures(folder, [20])
    result = command("index", "build", folder, "--output", built)
    assert (result["encoded"], result["reused"], result["unchanged"]) == (2, 2, 8)
    assert sorted(result["removed"]) == [name(2), name(1)]
    assert result["duplicates"] == []
    command("index", "build", folder, "--output", tmp_path / "fresh", *MODEL)
    assert_same(open_index(built), open_index(tmp_path / "fresh"))


def test_copies_in_a_batch_ask_the_index_once_for_the_vector_they_share(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = emoji.png(EMOJI[0])
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        (tmp_path / "pictures" / f"{number:02d}.png").write_bytes(picture)
    asked, stored = [], IndexWriter.stored

    def counted(writer: IndexWriter, ids: Iterable[Any], **reading: Any) -> dict[Any, NewItem]:
        asked.append(len(found := stored(writer, ids, **reading)))
        return found

    monkeypatch.setattr(IndexWriter, "stored", counted)
    small = ("--batch-size", 4, "--commit-every", 1, "--num-workers", 0)
    result = command("index", "build", tmp_path / "pictures", "--output", tmp_path / "i", *small, *MODEL)
    assert (result["encoded"], result["reused"], len(result["duplicates"])) == (1, 11, 11)
    assert asked == [0, 1, 1]  # a batch
    index = open_index(tmp_path / "i")
    assert {index.vector(one).tobytes() for one in index.ids} == {index.vector("00.png").tobytes()}


def test_pictures_that_exchange_names_exchange_vectors(built: Path, tmp_path: Path, command: Command) -> None:
    folder, before = tmp_path / "pictures", vectors(open_index(built))
    for one, other in ((0, "t"), (11, 0), ("t", 11)):
        os.replace(*(folder / (one if isinstance(one, str) else name(one)) for one in (one, other)))
    command("index", "build", folder, "--output", built, "--commit-every", 1, "--num-workers", 0, "--batch-size", 1)
    after = open_index(built)
    np.testing.assert_allclose(after.vector(name(0)), before[name(11)], atol=1e-5)
    np.testing.assert_allclose(after.vector(name(11)), before[name(0)], atol=1e-5)
    assert len(after) == 12


def test_missing_pictures_can_be_kept(built: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "pictures" / name(2)).unlink()
    result = command("index", "build", tmp_path / "pictures", "--output", built, "--keep-missing")
    assert (result["removed"], result["num_items"]) == ([], 12)


def test_a_picture_that_became_unreadable_is_removed(built: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "pictures" / name(2)).write_bytes(b"no picture")
    result = command("index", "build", tmp_path / "pictures", "--output", built)
    assert result["removed"] == [name(2)]


def test_a_folder_that_moved_keeps_its_vectors(built: Path, tmp_path: Path, command: Command) -> None:
    shutil.move(tmp_path / "pictures", tmp_path / "moved")
    (tmp_path / "moved" / name(4)).unlink()
    result = command("index", "build", tmp_path / "moved", "--output", built)
    assert (result["encoded"], result["reused"], result["removed"]) == (0, 11, [name(4)])


def test_another_folder_empties_no_index_unless_told_to(
    built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]
) -> None:
    write_pictures(tmp_path / "others", [30, 31])
    args = ("index", "build", tmp_path / "others", "--output", built)
    assert refusal(*args).startswith(
        f"{built}: was built from {tmp_path / 'pictures'}, and 12 of its 12 items are not in {tmp_path / 'others'}; "
    )
    assert command("index", "info", built)["num_items"] == 12
    result = command(*args, "--replace-source")
    assert (len(result["removed"]), result["encoded"], result["num_items"]) == (12, 2, 2)
    # Once more from there, nothing is to be replaced any more.
    assert command(*args)["unchanged"] == 2


def test_a_source_that_is_not_there_empties_no_index(
    built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, before = tmp_path / "pictures", open_index(built).ids
    args = ("index", "build", pictures, "--output", built)

    def scandir(path: Any = ".") -> Any:
        if Path(path) == pictures:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert refusal(*args) == f"{pictures}: cannot be read (Permission denied); is the disk there?"
    picture = pictures / name(2)
    assert "expected a folder; one picture goes into an index with: cn-clip index add" in refusal(
        "index", "build", picture, "--output", built
    )
    pictures.rename(tmp_path / "unmounted")
    pictures.mkdir()
    assert "none of the 12 pictures is there any more, so nothing was removed" in command(*args, status=1)["error"]
    assert open_index(built).ids == before
    (pictures / "d0").symlink_to(tmp_path / "absent")
    shutil.copytree(tmp_path / "unmounted" / "d1", pictures / "d1")
    command(*args)
    assert sorted(open_index(built).ids) == sorted(before)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_only_what_is_not_there_is_gone(
    built: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pictures, real = tmp_path / "pictures", os.stat

    def stat(path: Any, **options: Any) -> Any:
        if str(path) == str(pictures / name(2)):
            raise OSError(number, os.strerror(number))
        return real(path, **options)

    (pictures / name(4)).unlink()
    monkeypatch.setattr(os, "lstat", stat)
    assert command("index", "build", pictures, "--output", built)["removed"] == [name(4)]


def test_an_index_that_may_not_be_entered_is_refused(
    built: Path, tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path, *_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", deny)
        patch.setattr(Path, "read_text", deny)
        message = refusal("index", "build", tmp_path / "pictures", "--output", built)
    assert (
        message
        == f"{built / 'manifest.json'}: cannot be read just now (Permission denied, errno 13); is the disk there?"
    )


def test_a_folder_that_goes_during_the_walk_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, real = write_pictures(tmp_path / "pictures", range(4)), os.walk

    def walk(*args: Any, **options: Any) -> Any:
        for place, folders, names in real(*args, **options):
            if place.endswith("d0"):
                shutil.rmtree(place)
            yield place, folders, names

    monkeypatch.setattr(os, "walk", walk)
    source = sources.open_source(pictures)
    assert [one.id for one in source.candidates] == [name(1), name(3)]
    assert [(one.id, one.is_gone) for one in source.skipped] == [("d0", False)]


def test_an_index_among_the_pictures_is_passed_over(tmp_path: Path, command: Command) -> None:
    folder = write_pictures(tmp_path / "pictures", range(3))
    for _ in range(2):
        result = command("index", "build", folder, "--output", folder / "i", *MODEL)
        assert (result["num_items"], result["skipped"]) == (3, [])


def test_a_second_run_may_change_the_engine_but_not_the_vectors(
    built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]
) -> None:
    args = ("index", "build", tmp_path / "pictures", "--output", built)
    command(*args, "--engine", "usearch")
    assert open_index(built).manifest.engine == "usearch"
    command(*args)
    assert open_index(built).manifest.engine == "usearch"
    assert refusal(*args, "--vector-type", "float16") == (
        f"{built}: holds float32 vectors; build another index for others"
    )


# --- kills


def test_a_killed_build_keeps_what_it_reported_and_goes_on(tmp_path: Path, command: Command) -> None:
    folder = write_pictures(tmp_path / "pictures", range(150))
    output = tmp_path / "i"
    args = ["index", "build", folder, "--output", output, *MODEL, "--batch-size", "4", "--commit-every", "8"]
    with subprocess.Popen(
        [warm_python.program(), "-m", "cn_clip", *map(str, args)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    done = [int(match[1]) for match in map(re.compile(r"(\d+) / 150 done").search, lines) if match]
    assert done[:3] == [8, 16, 24]
    index = open_index(output)
    assert len(index) >= done[-1]
    assert len(set(index.ids)) == len(index)
    survived = vectors(index)
    result = command(*args)
    assert (result["unchanged"], result["encoded"]) == (len(survived), 150 - len(survived))
    command("index", "build", folder, "--output", tmp_path / "whole", *MODEL)
    assert_same(open_index(output), open_index(tmp_path / "whole"))
    assert all(open_index(output).vector(one).tolist() == vector for one, vector in survived.items())


# --- other sources


def test_a_split_is_indexed_with_captions_and_again_only_what_changed(tmp_path: Path, command: Command) -> None:
    def split(numbers: Sequence[int]) -> Path:
        shutil.rmtree(tmp_path / "lmdb", ignore_errors=True)
        with SplitWriter(tmp_path / "lmdb") as writer:
            for number in numbers:
                data = b"no picture" if number == 3 else emoji.png(EMOJI[number])
                writer.put_image(number, tsv_line(number, data).split(b"\t")[1].strip())
                writer.put_pair(Pair(number, number, EMOJI[number].name))
        return tmp_path / "lmdb"

    result = command("index", "build", split([1, 2, 3, 10]), "--output", tmp_path / "i", *MODEL)
    assert (result["encoded"], [one["id"] for one in result["skipped"]]) == (3, [3])
    index = open_index(tmp_path / "i")
    assert index.ids == [1, 10, 2]
    assert index.metadata(10)["caption"] == EMOJI[10].name
    assert command("search", tmp_path / "i", "--id", "10", "--k", 1)["hits"][0]["id"] in (1, 2)
    result = command("index", "build", split([1, 10, 11]) / "imgs", "--output", tmp_path / "i")
    assert (result["encoded"], result["unchanged"], result["removed"]) == (1, 2, [2])


def feature_file(path: Path, count: int) -> tuple[Path, Any]:
    rows = np.random.default_rng(0).normal(size=(count, 256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    write_features(path, "image_id", [(list(range(count)), rows)])
    return path, rows


def test_features_of_another_length_are_normalised_and_those_of_length_0_refused(
    tmp_path: Path, refusal: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    write_features(path, "image_id", [([1, 2, 3], np.array([[3, 4], [0.6, 0.8], [0, -1]], dtype=np.float32))])
    cli.main(["index", "build", str(path), "--output", str(tmp_path / "i")])
    out = capsys.readouterr()
    assert "added 3, unchanged 0" in out.out
    assert "encoded" not in out.out
    assert f"{path}: normalised 1 row whose length was not 1" in out.out
    index = open_index(tmp_path / "i")
    assert [index.vector(one).tolist() for one in (1, 2)] == [np.array([0.6, 0.8], dtype=np.float32).tolist()] * 2
    assert [hit.id for hit in index.search(index.vector(2)[None], 3)[0]] == [1, 2, 3]
    write_features(path, "image_id", [([1, 2], np.array([[1, 0], [0, 0]], dtype=np.float32))])
    assert refusal("index", "build", path, "--output", tmp_path / "i") == (
        f"{path}: image_id 2: its features are all 0, which have no direction"
    )


def test_a_feature_file_is_indexed_as_it_is(tmp_path: Path, command: Command, refusal: Callable[..., str]) -> None:
    path, rows = feature_file(tmp_path / "a.img_feat.jsonl", 5)
    (tmp_path / "t.jsonl").write_text('{"image": 3, "text": "三", "group": "奇"}\n')
    args = ("index", "build", path, "--output", tmp_path / "i")
    result = command(*args, "--metadata", tmp_path / "t.jsonl", "--commit-every", 2)
    assert (result["added"], result["encoded"]) == (5, 0)
    index = open_index(tmp_path / "i")
    assert [index.vector(number).tolist() for number in index.ids] == rows.tolist()
    assert index.metadata(3) == {"source": str(path), "caption": "三", "group": "奇"}
    assert index.thumbnail(3) is None
    assert "does not record its model" in refusal("search", tmp_path / "i", "猫")
    feature_file(path, 4)
    result = command(*args)
    assert (result["unchanged"], result["encoded"], result["removed"]) == (4, 0, [4])
    small = tmp_path / "small.jsonl"
    small.write_text('{"image_id": 1, "feature": [1.0, 0.0]}\n')
    assert "vectors of 2 numbers, the index" in refusal("index", "add", tmp_path / "i", small)
    assert "vectors of 2 numbers, the model Emoji-Tiny gives 256" in refusal(
        "index", "build", small, "--output", tmp_path / "j", *MODEL
    )
    assert not (tmp_path / "j").exists()


def test_features_take_no_place_of_pictures_and_lend_no_vector(
    built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]
) -> None:
    before, random = vectors(open_index(built)), np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)
    random /= np.linalg.norm(random)
    write_features(tmp_path / "f.jsonl", "image_id", [([name(2)], random)])
    assert "does not record its model" in refusal("index", "add", built, tmp_path / "f.jsonl")
    model = ("--model", "Emoji-Tiny")
    assert "give --id-prefix" in refusal("index", "add", built, tmp_path / "f.jsonl", *model)
    assert "holds float32 vectors" in refusal(
        "index", "build", tmp_path / "f.jsonl", "--output", built, "--vector-type", "float16", *model
    )
    assert vectors(open_index(built)) == before
    command("index", "build", tmp_path / "f.jsonl", "--output", built, "--keep-missing", *model)
    index = open_index(built)
    assert index.vector(name(2)).tolist() == random[0].tolist()
    assert index.metadata(name(2)) == {"source": str(tmp_path / "f.jsonl")}
    copy = tmp_path / "more" / "copy.png"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "pictures" / name(2), copy)
    assert command("index", "add", built, copy.parent)["encoded"] == 1
    np.testing.assert_allclose(open_index(built).vector("copy.png"), before[name(2)], atol=1e-5)


def test_an_index_that_came_meanwhile_of_another_model_is_refused(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, real = write_pictures(tmp_path / "pictures", [1]), jobs.open_encoder

    def slow(*args: Any, **options: Any) -> Any:
        opened = real(*args, **options)
        with open_writer(tmp_path / "i", Manifest(ModelInfo("Other", "ffff", 256))):
            return opened

    monkeypatch.setattr(jobs, "open_encoder", slow)
    message = refusal("index", "build", pictures, "--output", tmp_path / "i", *MODEL)
    assert "its vectors are of the model Other (ffff), not of Emoji-Tiny" in message
    assert len(open_index(tmp_path / "i")) == 0


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("t.csv", "", "t.csv: holds no row"),
        ("t.jsonl", "", "t.jsonl: holds no row"),
        (
            "t.csv",
            "a.png,一,x\nb.png,二,y\n",
            "t.csv:1: the first line, 'a.png, 一, x', is a row and names no columns; put",
        ),
        ("t.csv", "file,group\na.png,x\n", "t.csv:1: expected a picture in the column 'image'; has ['file', 'group']"),
        ("t.jsonl", '{"image": true}', "t.jsonl:1 image: expected the name of a picture or an int, got True"),
        ("t.jsonl", '{"image": 1.5}', "t.jsonl:1 image: expected the name of a picture or an int, got 1.5"),
        ("t.jsonl", '{"image": "a"}\n{"image": "b", "x": NaN}', "t.jsonl:2: id 'b': its metadata is nothing that JSON"),
    ],
)
def test_faulty_tables_are_refused_before_the_work(
    tmp_path: Path, file: str, text: str, sentence: str, refusal: Callable[..., str]
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    pictures = write_pictures(tmp_path / "pictures", [1])
    assert sentence in refusal("index", "build", pictures, "--output", tmp_path / "i", "--metadata", tmp_path / file)
    assert not (tmp_path / "i").exists()


def test_metadata_of_a_table_is_kept_and_filters(
    built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        f"image,text,group,year\n{name(1)},一号,动物,2020\n{name(1)},又,植物,1\n./{name(4)},,植物,2021\nx,,,\n"
    )
    args = ("index", "build", tmp_path / "pictures", "--output", built)
    result = command(*args, "--metadata", table)
    assert (result["reused"], result["unchanged"], result["unmatched_rows"]) == (2, 10, 1)
    metadata = open_index(built).metadata(name(1))
    assert (metadata["caption"], metadata["group"], metadata["year"]) == ("一号", "动物", "2020")
    assert command(*args)["unchanged"] == 12  # without the table what is known stays
    os.utime(tmp_path / "pictures" / name(4), (1, 1))
    command(*args)
    hits = command("search", built, "--id", name(0), "--where", "year>=2020")["hits"]
    assert sorted(hit["id"] for hit in hits) == [name(4), name(1)]
    hits = command("search", built, "--id", name(0), "--where", "group=植物 year>2020")["hits"]
    assert [hit["id"] for hit in hits] == [name(4)]
    table.write_text(f"image,size\n{name(1)},3\n")
    assert refusal(*args, "--metadata", table) == (
        f"{table}:2: the column 'size' is the index's own; give it another name"
    )
    table.write_text("file,size\na,3\n")
    assert "expected a picture in the column 'image'; has ['file', 'size']" in refusal(*args, "--metadata", table)


# --- add, remove, info, check


def test_add_and_remove(built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]) -> None:
    more = write_pictures(tmp_path / "more", [3, 30])
    message = refusal("index", "add", built, more)
    assert message.startswith(f"{built}: has an item {name(3)} of {tmp_path / 'pictures'}; give --id-prefix")
    result = command("index", "add", built, more, "--id-prefix", "more/")
    assert (result["encoded"], result["reused"], result["num_items"]) == (1, 1, 14)
    assert result["duplicates"] == [{"id": f"more/{name(3)}", "same_as": name(3)}]
    command("index", "add", built, more / name(30))
    assert "030.png" in open_index(built)
    assert command("index", "build", tmp_path / "pictures", "--output", built)["num_items"] == 15  # only its own
    assert refusal("index", "remove", built, name(1), "absent") == f"{built}: has no item 'absent'; nothing was removed"
    result = command("index", "remove", built, name(1), name(1), "030.png")
    assert (result["removed"], result["num_items"]) == ([name(1), "030.png"], 13)
    everything = refusal("index", "remove", built, "--where", "width=64")
    assert everything.startswith(
        "--where width=64: fits all 13 items, so nothing was removed; to remove them all, give"
    )
    assert "where: no item has the field 'group'; there are: digest" in refusal(
        "index", "remove", built, "--where", "group!=x"
    )
    result = command("index", "remove", built, "--where", f"source={tmp_path / 'more'}")
    assert (sorted(result["removed"]), result["num_items"]) == ([f"more/{name(30)}", f"more/{name(3)}"], 11)
    assert command("index", "remove", built, "--where", "width=64", "--all")["num_items"] == 0


def test_info_tells_model_and_counts(built: Path, command: Command) -> None:
    command("index", "remove", built, name(1))
    result = command("index", "info", built)
    assert result.pop("bytes") == sum(
        path.stat().st_size for path in built.rglob("*") if path.is_file() and path.parent != built
    ) + sum(path.stat().st_size for path in built.glob("removed-*"))
    assert (result.pop("generation"), result["model"].pop("fingerprint")) == (5, "dd8b50067459b177")
    assert result == {
        "index": str(built),
        "model": {"name": "Emoji-Tiny", "embed_dim": 256},
        "num_items": 11,
        "num_removed": 1,
        "engine": "exact",
        "has_graph": False,
        "vector_type": "float32",
        "num_segments": 3,
        "pictures": {"upright": True, "decode": "auto", "ocr": False},
        "source": str(built.parent / "pictures"),
    }


def flip(path: Path) -> None:
    """Changes a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_check_finds_changed_bytes_and_repair_makes_vectors_from_pictures(
    built: Path, tmp_path: Path, command: Command
) -> None:
    before = open_index(built)
    assert command("index", "check", built)["damaged"] == []
    segment = sorted(built.glob("segment-*"))[1]
    flip(segment / "vectors.npy")
    result = command("index", "check", built, status=1)
    assert result["damaged"] == [{"path": f"{segment.name}/vectors.npy", "reason": "its bytes have changed"}]
    (tmp_path / "pictures" / name(1)).unlink()  # of this segment, too
    result = command("index", "check", built, "--repair", status=1)
    assert (result["lost"], result["num_lost"], result["num_items"]) == ([name(1)], 1, 11)
    after = open_index(built)
    assert command("index", "check", built)["damaged"] == []
    for item_id in after.ids:
        np.testing.assert_allclose(after.vector(item_id), before.vector(item_id), atol=1e-5)
        assert after.metadata(item_id) == before.metadata(item_id)
        assert after.thumbnail(item_id) == before.thumbnail(item_id)


def test_repair_keeps_vectors_whose_thumbnails_are_damaged(built: Path, tmp_path: Path, command: Command) -> None:
    before = vectors(open_index(built))
    shutil.rmtree(tmp_path / "pictures")
    (sorted(built.glob("segment-*"))[0] / "thumbnails.bin").write_bytes(b"")
    result = command("index", "check", built, "--repair")
    assert (result["lost"], result["num_items"], result["num_without_thumbnails"]) == ([], 12, 5)
    index = open_index(built)
    assert vectors(index) == before
    assert [index.thumbnail(one) is None for one in index.ids] == [False] * 7 + [True] * 5


def test_repair_keeps_thumbnails_of_pictures_that_are_gone(built: Path, tmp_path: Path, command: Command) -> None:
    index = open_index(built)
    before = {one: index.thumbnail(one) for one in index.ids}
    shutil.rmtree(tmp_path / "pictures")
    path = sorted(built.glob("segment-*"))[0] / "items.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"width"', b'"breit"', 1))
    result = command("index", "check", built, "--repair")
    assert (result["lost"], result["num_without_thumbnails"]) == ([], 0)
    index = open_index(built)
    assert {one: index.thumbnail(one) for one in index.ids} == before


def test_repair_says_what_it_cannot_repair(built: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(built) as opened, monkeypatch.context() as patched:
        patched.setattr(Snapshot, "positions_of", lambda *_: {})  # a fault of the program
        opened.commit([NewItem(name(1), np.ones(256, dtype=np.float32))])
    damage = [{"path": "manifest.json", "reason": "1 ids come twice"}]
    for flags in ((), ("--repair",)):
        result = command("index", "check", built, *flags, status=1)
        assert (result["damaged"], result["remaining"]) == (damage, damage)


def test_repair_tells_what_has_lost_its_name_and_build_brings_it_back(
    built: Path, tmp_path: Path, command: Command
) -> None:
    before = vectors(open_index(built))
    shutil.move(tmp_path / "pictures", tmp_path / "away")
    path = sorted(built.glob("segment-*"))[0] / "items.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"?" + lines[1][1:]
    lines[3] = lines[3].replace(name(6).encode(), name(8).encode(), 1)  # the id, not the path
    path.write_bytes(b"".join(lines))
    result = command("index", "check", built, "--repair", status=1)
    assert (result["num_lost"], result["num_items"]) == (2, 10)
    assert vectors(open_index(built)) == {one: row for one, row in before.items() if one not in (name(2), name(6))}
    shutil.move(tmp_path / "away", tmp_path / "pictures")
    assert command("index", "build", tmp_path / "pictures", "--output", built)["encoded"] == 2
    assert len(open_index(built)) == 12


def test_repair_reads_items_without_the_table_of_rows(built: Path, tmp_path: Path, command: Command) -> None:
    before = vectors(open_index(built))
    shutil.rmtree(tmp_path / "pictures")
    flip(sorted(built.glob("segment-*"))[0] / "rows.npy")
    result = command("index", "check", built, "--repair")
    assert (result["num_lost"], result["num_items"]) == (0, 12)
    assert vectors(open_index(built)) == before


def test_repair_takes_vectors_from_the_feature_file(tmp_path: Path, command: Command) -> None:
    path, rows = feature_file(tmp_path / "a.img_feat.jsonl", 5)
    command("index", "build", path, "--output", tmp_path / "i")
    flip(next((tmp_path / "i").glob("segment-*")) / "vectors.npy")
    assert command("index", "check", tmp_path / "i", "--repair")["num_lost"] == 0
    assert list(vectors(open_index(tmp_path / "i")).values()) == rows.tolist()


def test_repair_without_the_list_of_removed_items_is_refused(
    built: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("index", "remove", built, name(1))
    next(built.glob("removed-*")).unlink()
    with pytest.raises(SystemExit):
        cli.main(["index", "check", str(built), "--repair"])
    assert "is damaged, and no other file tells which items were removed" in capsys.readouterr().err


# --- refusals


def test_a_picture_that_the_model_has_no_vector_for_is_named(tmp_path: Path, refusal: Callable[..., str]) -> None:
    import torch

    from cn_clip.clip.loading import open_model

    write_pictures(tmp_path / "pictures", range(3))
    model, _ = open_model("Emoji-Tiny")
    model.visual.attnpool.c_proj.bias.data[0] = float("nan")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "nan.pt")
    message = refusal(
        "index", "build", tmp_path / "pictures", "--output", tmp_path / "i", "--model", tmp_path / "nan.pt"
    )
    assert re.search(r"id '.+': the model gives NaN or infinity; compute in fp32", message)


def test_a_copy_that_is_computed_after_its_owner_has_changed_is_named_itself(
    built: Path, tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wrong = tmp_path / "pictures", emoji.png(EMOJI[0])
    (folder / name(0)).write_bytes(emoji.png(EMOJI[50]))  # the owner
    (folder / "d1/zz_copy.png").write_bytes(wrong)
    (folder / "d1/zzz.png").write_bytes(emoji.png(EMOJI[51]))
    pixels = ImageTransform(64).array(Image.open(io.BytesIO(wrong)))
    encode = TorchBackend.encode_pixels

    def without_one(backend: TorchBackend, given: Any) -> Any:
        if positions := [number for number, one in enumerate(given) if np.array_equal(one, pixels)]:
            raise NotFiniteError("row", positions)
        return encode(backend, given)

    monkeypatch.setattr(TorchBackend, "encode_pixels", without_one)
    assert "id 'd1/zz_copy.png': " in refusal("index", "build", folder, "--output", built)


def test_another_model_is_refused_with_both_names(
    built: Path, tmp_path: Path, refusal: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from cn_clip.clip.loading import open_model

    model, _ = open_model("Emoji-Tiny")
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"] + 1
    torch.save({"epoch": 1, "step": 1, "name": "x", "state_dict": state, "optimizer": {}}, tmp_path / "other.pt")
    for args in (
        ("index", "build", tmp_path / "pictures", "--output", built, "--model", tmp_path / "other.pt"),
        ("index", "add", built, tmp_path / "pictures", "--model", tmp_path / "other.pt"),
        ("search", built, "猫", "--model", tmp_path / "other.pt"),
    ):
        message = refusal(*args)
        assert (
            f"its vectors are of the model Emoji-Tiny (dd8b50067459b177), not of {tmp_path / 'other.pt'} (" in message
        )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("build", "{tmp}/absent", "--output", "{tmp}/i", *MODEL), "{tmp}/absent: no such file or folder; expected"),
        (("build", "{tmp}/empty", "--output", "{tmp}/i", *MODEL), "{tmp}/empty: holds no picture"),
        (("build", "{tmp}/empty", "--output", "{tmp}/i", "--metadata", "{tmp}/t.txt"), "t.txt: expected a table whose"),
        (
            ("build", "{tmp}/empty", "--output", "{tmp}/i", "--metadata", "{tmp}/t.csv"),
            "t.csv: no such file; give a table whose",
        ),
        (("add", "{tmp}/absent", "{tmp}/empty"), "{tmp}/absent: is no index; build one with"),
        (("remove", "{tmp}/absent", "a"), "{tmp}/absent: is no index; build one with"),
        (("remove", "{tmp}/absent", "--where", "a"), "where: character 1: expected a condition such as group=动物"),
        (("info", "{tmp}/absent"), "{tmp}/absent: is no index; build one with"),
        (("check", "{tmp}/empty"), "{tmp}/empty: is no index; build one with"),
    ],
)
def test_faulty_input_is_refused_in_one_sentence(
    tmp_path: Path, refusal: Callable[..., str], args: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert sentence.format(tmp=tmp_path) in refusal("index", *(one.format(tmp=tmp_path) for one in args))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("build", "p"), "--output: expected the folder of the index"),
        (("build", "p", "--output", "i", "--batch-size", "0"), "--batch-size: expected at least 1, got 0"),
        (("build", "p", "--output", "i", "--commit-every", "0"), "--commit-every: expected at least 1, got 0"),
        (("build", "p", "--output", "i", "--num-workers", "-1"), "--num-workers: expected at least 0, got -1"),
        (("build", "p", "--output", "i", "--precision", "int8"), "precision: the torch backend computes in"),
        (("remove", "i"), "give the ids of the items to remove, or --where"),
    ],
)
def test_faulty_settings_are_refused_with_status_2(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["index", *args])
    assert sentence in " ".join(re.sub("[│|]", " ", capsys.readouterr().err).split())
