"""Pictures whose cost their head does not bound: another process decodes them, and is killed when it takes too long."""

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import picture_bombs as bombs
import pytest
from dataset_files import jsonl_line, tsv_line, write_split
from PIL import Image, ImageOps

from cn_clip import cli
from cn_clip.clip import Encoder, decoding, pictures
from cn_clip.clip.decoding import REFUSED, DecodingProcess, ProcessClosedError, opened_elsewhere, packed, unpacked
from cn_clip.clip.picture_files import is_bounded, look, opened_here
from cn_clip.clip.pictures import decode, opened
from cn_clip.data.pictures import check_picture
from cn_clip.emoji_pack import load
from cn_clip.errors import DataError

TOO_LONG = "it takes more than the 0.25 seconds, and 0.25 for a million pixels, that a picture has"
EXIF = Image.Exif()
EXIF[0x0112] = 6
NOISE = Image.effect_noise((33, 21), 64)


def encoded(image: Image.Image, kind: str, **given: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **given)
    return stream.getvalue()


def palette(transparency: int | bytes) -> Image.Image:
    image = NOISE.convert("RGB").quantize(7)
    image.info["transparency"] = transparency
    return image


@pytest.fixture(autouse=True, scope="module")
def _end_processes() -> Iterator[None]:
    yield
    decoding._end()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 0.25)


PICTURES: dict[str, Callable[[], bytes]] = {
    "one bit": lambda: encoded(NOISE.convert("1"), "PNG"),
    "grey": lambda: encoded(NOISE, "TIFF"),
    "grey of 16 bits": lambda: encoded(NOISE.convert("I;16"), "TIFF"),
    "integers": lambda: encoded(NOISE.convert("I"), "TIFF"),
    "floats": lambda: encoded(NOISE.convert("F"), "TIFF"),
    "a palette": lambda: encoded(NOISE.convert("RGB").quantize(7), "TIFF"),
    "a palette, one colour clear": lambda: encoded(palette(3), "PNG"),
    "a palette with alpha": lambda: encoded(palette(bytes(range(0, 70, 10))), "PNG"),
    "a clear colour": lambda: encoded(NOISE.convert("RGB"), "PNG", transparency=(9, 9, 9)),
    "a clear grey": lambda: encoded(NOISE, "PNG", transparency=9),
    "colour": lambda: encoded(NOISE.convert("RGB"), "PPM"),
    "CMYK": lambda: encoded(NOISE.convert("CMYK"), "TIFF"),
    "alpha": lambda: encoded(NOISE.convert("RGBA"), "WEBP", lossless=True),
    "grey and alpha": lambda: encoded(NOISE.convert("LA"), "PNG"),
    "turned": lambda: encoded(NOISE.convert("RGB"), "JPEG", exif=EXIF),
    "turned TIFF": lambda: encoded(NOISE.convert("RGB"), "TIFF", exif=EXIF),
    "JPEG 2000": lambda: encoded(NOISE.convert("RGB"), "JPEG2000"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_another_process_is_that_of_this_one(name: str) -> None:
    data = PICTURES[name]()
    here, there = opened_here(data, look(data)), opened_elsewhere(data)
    here.load()
    assert (there.mode, there.size, there.format) == (here.mode, here.size, here.format)
    assert there.tobytes() == here.tobytes()
    if here.mode[0] not in "IF":
        assert there.convert("RGBA").tobytes() == here.convert("RGBA").tobytes()
    assert there.has_transparency_data == here.has_transparency_data
    assert ImageOps.exif_transpose(there).size == ImageOps.exif_transpose(here).size
    assert unpacked(packed(there)).tobytes() == here.tobytes()


def test_what_programs_write_is_bounded_and_other_formats_and_far_more_bytes_are_not() -> None:
    assert all(is_bounded(one.picture, look(one.picture)) for one in load())
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        for size in ((1, 1), (300, 200), (1000, 700)):
            data = encoded(Image.effect_noise(size, 64).convert("RGB"), kind)
            assert is_bounded(data, look(data)), kind
    sixteen = encoded(Image.frombytes("I;16", (500, 400), os.urandom(400_000)), "PNG")
    assert is_bounded(sixteen, look(sixteen))
    for kind in ("TIFF", "PPM", "JPEG2000"):
        data = encoded(NOISE, kind)
        assert not is_bounded(data, look(data)), kind
    large = encoded(NOISE, "PNG") + bytes(100_000)
    assert not is_bounded(large, look(large))
    assert opened(large).tobytes() == NOISE.tobytes()
    heif = b"\0\0\0\x1cftypmif1\0\0\0\0"
    assert not is_bounded(heif, look(heif))
    # What no plugin of Pillow takes needs no process to be refused.
    assert is_bounded(b"no picture", None)
    with pytest.raises(Image.UnidentifiedImageError):
        opened(b"no picture")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("name", bombs.UNBOUNDED)
def test_a_picture_that_takes_too_long_is_refused_by_name_and_the_next_one_is_decoded(
    name: str, tmp_path: Path
) -> None:
    path, data = tmp_path / "holiday.ppm", bombs.UNBOUNDED[name]()
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^{path}: not decoded: {TOO_LONG}$"):
        Encoder("Emoji-Tiny", device="cpu").encode_images([path])
    with pytest.raises(DataError, match=rf"^the picture of {len(data)} bytes is not decoded: {TOO_LONG}$"):
        check_picture(data, "decode")
    assert decode(encoded(NOISE, "TIFF")).tobytes() == NOISE.tobytes()


def test_damage_is_told_in_the_words_of_pillow() -> None:
    with pytest.raises(OSError, match=r"^image file is truncated"):
        decode(b"P6 9 9 255\n")
    with pytest.raises(OSError, match=r"^no known picture format$"):
        opened(b"II*\0" + bytes(9))
    with pytest.raises(DataError, match=r"does not decode .*no known picture format"):
        check_picture(b"II*\0", "header")


@pytest.mark.usefixtures("hurried")
def test_commands_name_the_picture_that_takes_too_long_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bomb = tmp_path / "pictures", bombs.pbm_comments(500_000)
    folder.mkdir()
    (folder / "1猫.pbm").write_bytes(bomb)
    (folder / "2狗.webp").write_bytes(load()[0].picture)
    cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), "--model", "Emoji-Tiny", "--json"])
    built = json.loads(capsys.readouterr().out)
    assert [(one["id"], TOO_LONG in one["reason"]) for one in built["skipped"]] == [("1猫.pbm", True)]
    cli.main(["dataset", "from-folder", "--folder", str(folder), "--output", str(tmp_path / "d"), "--on-error", "skip"])
    said = capsys.readouterr().err
    assert "1猫.pbm" in said
    assert TOO_LONG in said

    data = tmp_path / "data"
    lines = [tsv_line(1, bomb), tsv_line(2, load()[0].picture)]
    write_split(data, lines, [jsonl_line(1, "猫", [2])])
    with pytest.raises(SystemExit) as left:
        cli.main(["dataset", "check", "--data-dir", str(data), "--splits", "train"])
    assert left.value.code == 1
    assert TOO_LONG in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["dataset", "build", "--data-dir", str(data), "--splits", "train"])
    assert f"image id 1: the picture of {len(bomb)} bytes is not decoded: {TOO_LONG}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_a_forked_child_leaves_the_processes_of_its_parent_alone() -> None:
    data = encoded(NOISE, "TIFF")
    decoding._end()
    opened_elsewhere(data)
    (process,) = decoding._idle
    child = os.fork()
    if child == 0:
        status = 1
        try:
            same = opened_elsewhere(data).tobytes() == NOISE.tobytes()
            status = 0 if same and process not in decoding._idle else 1
            decoding._end()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process.is_running
    assert opened_elsewhere(data).tobytes() == NOISE.tobytes()
    assert decoding._idle == [process]


def test_threads_have_a_process_each_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = encoded(NOISE, "TIFF")
    with ThreadPoolExecutor(3) as pool:
        assert {image.tobytes() for image in pool.map(opened_elsewhere, [data] * 9)} == {NOISE.tobytes()}
    processes = [one.child for one in decoding._idle]
    assert 1 <= len(processes) <= 3
    decoding._end()
    assert all(process is not None and process.poll() is not None for process in processes)


def test_where_no_process_can_be_started_pictures_are_decoded_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoding._end()
    pictures._say_unwatched.cache_clear()
    monkeypatch.setattr(decoding.sys, "executable", "/nonexistent/python")
    for _ in range(2):
        assert decode(encoded(NOISE, "TIFF")).tobytes() == NOISE.tobytes()
    assert [one.message.split(":")[0] for one in caplog.records] == [
        "pictures are decoded without a bound on their time"
    ]
    pictures._say_unwatched.cache_clear()


def test_a_process_that_answers_too_much_or_is_closed_is_ended() -> None:
    process = DecodingProcess(None, num_bytes=10, spare_bytes=1 << 30)
    with pytest.raises(DataError, match="its decoder ended with status"):
        process.ask(encoded(Image.new("RGB", (90, 90)), "PNG"), 3, 10_000)
    process.close()
    with pytest.raises(ProcessClosedError):
        process.ask(b"", 3, 100)
    assert process.reap() is None


def test_an_answer_that_nobody_waited_for_is_not_that_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding._end()
    with monkeypatch.context() as patch:
        receive = DecodingProcess._received

        def interrupted(process: DecodingProcess) -> tuple[int, bytes]:
            if process.child is not None and process.child.poll() is None and sent:
                raise KeyboardInterrupt
            return receive(process)

        sent: list[bytes] = []
        send = DecodingProcess._send
        patch.setattr(DecodingProcess, "_send", lambda process, *data: (sent.extend(data[1:]), send(process, *data)))
        patch.setattr(DecodingProcess, "_received", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened_elsewhere(encoded(Image.new("RGB", (5, 5)), "TIFF"))
    assert opened_elsewhere(encoded(NOISE, "TIFF")).tobytes() == NOISE.tobytes()


def test_a_picture_that_needs_more_memory_than_there_is_is_refused() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux bounds the memory of a process")
    process = DecodingProcess(None, num_bytes=1 << 30, spare_bytes=20 << 20)
    try:
        kind, sentence = process.ask(encoded(Image.new("RGB", (8000, 8000)), "PNG"), 3, 1 << 30)
        assert (kind, sentence) == (REFUSED, b"it takes too much memory")
    finally:
        process.close()
        process.reap()
