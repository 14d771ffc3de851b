"""The words in pictures: read without a network and in silence, kept as a field, and searched beside the vectors."""

import io
import json
import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont
from video_files import write_video

from cn_clip import cli, data
from cn_clip.data import ocr
from cn_clip.demo import emoji
from cn_clip.features.files import write_features
from cn_clip.retrieval.store import open_index

MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")
EMOJI = emoji.load("twemoji")
Run = Callable[..., dict[str, Any]]


def drawn(text: str, mode: str = "RGB") -> Image.Image:
    """White, or transparent, with the words in black."""
    with zipfile.ZipFile(Path(data.__file__).parent / "noto_sans_sc.zip") as archive:
        font = ImageFont.truetype(io.BytesIO(archive.read("font.ttf")), 40)
    image = Image.new(mode, (480, 120), "white" if mode == "RGB" else (0, 0, 0, 0))
    ImageDraw.Draw(image).text((20, 30), text, fill="black", font=font)
    return image


@pytest.fixture(scope="module")
def reader() -> Iterator[ocr.Reader]:
    """The real one, which asks no network."""
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed: make test-ocr installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        patch.setattr(socket, "create_connection", None)
        yield ocr.Reader()


@pytest.mark.ocr
def test_words_are_read_in_silence(reader: ocr.Reader, capfd: pytest.CaptureFixture[str]) -> None:
    assert reader.read(drawn("今天开会")) == "今天开会"
    assert reader.read(drawn("今天开会", "RGBA")) == "今天开会"
    assert reader.read(Image.new("L", (60, 40), 255)) == ""
    assert reader.read(Image.new("RGB", (3000, 2))) == "" == reader.read(Image.new("RGB", (3000, 9)))
    assert capfd.readouterr() == ("", "")


def test_a_picture_stays_as_it_was_and_an_engine_that_cannot_be_made_keeps_no_thread_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Package:
        __file__ = str(tmp_path / "rapidocr.py")
        failures = 9

        def RapidOCR(self, params: object) -> Any:  # noqa: N802 - its name
            self.failures -= 1
            if self.failures >= 0:
                raise MemoryError
            return lambda pixels: None

    (tmp_path / "models").mkdir()
    for name in "abc":
        (tmp_path / "models" / f"{name}.onnx").touch()
    monkeypatch.setattr(ocr.extras, "require", lambda *given, **more: Package())
    reader, image = ocr.Reader(), Image.new("RGB", (3000, 1000))
    for _ in range(9):
        with pytest.raises(MemoryError):
            reader.read(image)
    assert (reader.read(image), image.size) == ("", (3000, 1000))


@pytest.mark.ocr
def test_a_text_is_cut_to_its_bound(reader: ocr.Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "MAX_CHARS", 2)
    assert reader.read(drawn("今天开会")) == "今天"


class PretendReader:
    """Reads the word of a picture by its colour; counts."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def read(self, image: Image.Image) -> str:
        """会议 in what is red."""
        self.sizes.append(image.size)
        red, green, _ = image.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        return "会议 密码" if red > 200 > 100 > green else ""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendReader:
    """In place of the real one."""
    one = PretendReader()
    monkeypatch.setattr("cn_clip.index.building.Reader", lambda: one)
    return one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three drawings, a red picture, and a red video."""
    path = tmp_path / "p"
    path.mkdir()
    for number in range(3):
        (path / f"{number}.png").write_bytes(emoji.png(EMOJI[number]))
    Image.new("RGB", (2000, 1000), "red").save(path / "red.jpg")
    write_video(path / "v.mp4", [(255, 0, 0)])
    return path


@pytest.fixture
def run(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command on the index of the folder, with --json."""

    def command(*args: object) -> dict[str, Any]:
        given = (
            ["index", "build", str(folder), "--output", str(tmp_path / "i")]
            if args[0] == "build"
            else ["search", str(tmp_path / "i")]
        )
        cli.main([*given, *map(str, args[1:]), *MODEL, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return command


def texts(path: Path) -> dict[Any, Any]:
    """The words by id."""
    return {item_id: metadata.get("text") for item_id, metadata in open_index(path).items()}


def test_words_become_a_field_and_later_runs_read_them_too(
    run: Run, tmp_path: Path, folder: Path, pretend: PretendReader
) -> None:
    run("build")
    assert set(texts(tmp_path / "i").values()) == {None}
    result = run("build", "--ocr")
    assert (result["reused"], result["encoded"], result["videos"]) == (4, 0, 1)
    expected = {"0.png": "", "1.png": "", "2.png": "", "red.jpg": "会议 密码", "v.mp4#t=0": "会议 密码"}
    assert texts(tmp_path / "i") == expected
    assert (1000, 500) not in pretend.sizes  # not as small as the model may see it
    del pretend.sizes[:]
    assert (run("build")["unchanged"], pretend.sizes) == (5, [])
    os.utime(folder / "red.jpg", (1, 1))
    run("build")
    assert (texts(tmp_path / "i"), pretend.sizes) == (expected, [])  # the same bytes
    Image.new("RGB", (9, 9), (250, 0, 0)).save(folder / "new.png")
    run("build")
    assert texts(tmp_path / "i") == {**expected, "new.png": "会议 密码"}
    assert pretend.sizes == [(9, 9)]


def test_a_text_finds_the_words_beside_the_vectors_unless_told_not_to(
    run: Run, tmp_path: Path, pretend: PretendReader
) -> None:
    run("build", "--ocr")
    bare = [hit["id"] for hit in run("search", "会议", "--no-words")["hits"]]
    found = run("search", "会议")["hits"]
    assert {found[0]["id"], found[1]["id"]} == {"red.jpg", "v.mp4#t=0"}
    by_vector = {hit["id"]: hit["score"] for hit in run("search", "会议", "--no-words")["hits"]}
    assert {hit["id"]: hit["score"] for hit in found} == pytest.approx(by_vector, abs=1e-6)
    assert [hit["id"] for hit in run("search", "没有的词")["hits"]] == [
        hit["id"] for hit in run("search", "没有的词", "--no-words")["hits"]
    ]
    run("build", "--no-ocr")
    assert [hit["id"] for hit in run("search", "会议")["hits"]] == bare


def test_features_beside_pictures_leave_it_as_it_was_how_these_are_read(
    run: Run, tmp_path: Path, pretend: PretendReader
) -> None:
    run("build", "--ocr")
    before = open_index(tmp_path / "i").pictures
    write_features(tmp_path / "f.jsonl", "image_id", [(["x"], open_index(tmp_path / "i").vector("0.png")[None])])
    cli.main(["index", "add", str(tmp_path / "i"), str(tmp_path / "f.jsonl"), *MODEL])
    assert open_index(tmp_path / "i").pictures == before
    assert before is not None
    assert before.ocr
    assert before.upright


def test_a_repair_does_not_keep_the_words_of_a_picture_that_was_replaced(
    run: Run, pretend: PretendReader, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("build", "--ocr")
    Image.new("RGB", (2000, 1000), "blue").save(folder / "red.jpg")
    for path in (tmp_path / "i").glob("segment-*/vectors.npy"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SystemExit):  # frames are lost until the next build
        cli.main(["index", "check", str(tmp_path / "i"), "--repair"])
    capsys.readouterr()
    run("build")
    assert texts(tmp_path / "i")["red.jpg"] == ""


def test_ocr_and_no_ocr_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["index", "build", str(tmp_path), "--output", str(tmp_path / "i"), "--ocr", "--no-ocr"])
    assert "--ocr and --no-ocr" in capsys.readouterr().err
