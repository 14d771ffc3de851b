"""What people's phones and cameras write: one table of formats and limits for the commands and the service."""

import io
import json
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import photo_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from serving import data_url, served

from cn_clip import cli
from cn_clip.clip import Encoder, decoding
from cn_clip.clip.orientation import full_size, upright
from cn_clip.clip.picture_files import Head, TooManyPixelsError, look, num_decoded, opened_here
from cn_clip.clip.picture_names import MOST_JPEG_PIXELS, MOST_PIXELS, format_of
from cn_clip.clip.pictures import decode, open_picture, opened
from cn_clip.data import facts
from cn_clip.data.pictures import check_picture, shrunk
from cn_clip.errors import DataError
from cn_clip.retrieval.store import open_index
from cn_clip.serve.limits import Limits

pytest.importorskip("pillow_heif")
pytest.importorskip("rawpy")

MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")
SCENE = Image.effect_noise((160, 120), 40).convert("RGB")
RAMP = np.tile(np.linspace(20, 200, 96).astype(np.uint8), (64, 1))
PREVIEW = photo_files.jpeg(Image.new("RGB", (1200, 800), (200, 30, 40)))


def saved(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    SCENE.save(stream, kind, **options)
    return stream.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.jpg": lambda: photo_files.jpeg(SCENE),
    "b.jpg": lambda: photo_files.mpo(SCENE, SCENE.resize((80, 60))),
    "c.heic": lambda: photo_files.heic(SCENE),
    "d.avif": lambda: saved("AVIF"),
    "e.tif": lambda: saved("TIFF", compression="tiff_deflate"),
    "f.dng": lambda: photo_files.dng(RAMP),
    "g.DNG": lambda: photo_files.dng(RAMP, preview=PREVIEW, preview_size=(1200, 800)),
    "h.png": lambda: saved("PNG"),
    "i.webp": lambda: saved("WEBP"),
    "j.gif": lambda: saved("GIF"),
    "k.bmp": lambda: saved("BMP"),
}
SIZES = {"f.dng": (48, 32), "g.DNG": (1200, 800)}


@pytest.fixture(autouse=True, scope="module")
def _end_processes() -> Iterator[None]:
    yield
    decoding._end()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    folder = tmp_path_factory.mktemp("photos")
    for name, make in FILES.items():
        (folder / name).write_bytes(make())
    return folder


# --- formats


def test_an_index_takes_every_format_and_the_service_answers_the_same_vectors(photos: Path, tmp_path: Path) -> None:
    cli.main(["index", "build", str(photos), "--output", str(tmp_path / "i"), *MODEL])
    index, encoder = open_index(tmp_path / "i"), Encoder("Emoji-Tiny", device="cpu", decode="auto", upright=True)
    assert index.ids == sorted(FILES)
    sizes = {one: (index.metadata(one)["width"], index.metadata(one)["height"]) for one in index.ids}
    assert sizes == {one: SIZES.get(one, (160, 120)) for one in FILES}
    with served(encoder) as address:
        inputs = [{"image": data_url((photos / one).read_bytes())} for one in index.ids]
        answer = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": inputs}, timeout=60)
        assert answer.status_code == 200, answer.text
        rows = [one["embedding"] for one in answer.json()["data"]]
    np.testing.assert_allclose([index.vector(one) for one in index.ids], rows, atol=1e-5)


def test_of_several_pictures_in_a_jpeg_the_first_is_seen_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    data = photo_files.mpo(SCENE, SCENE.resize((80, 60)))
    image = decode(data)
    assert (image.size, image.format) == ((160, 120), "JPEG")
    # Phones cut their videos and depths behind the picture off when they send it; Pillow warns of that.
    decode(data[: data.rindex(b"\xff\xd8\xff")] + bytes(30))
    assert not recwarn.list


def test_a_raw_file_is_seen_by_its_preview_else_developed_and_as_the_camera_was_held() -> None:
    data = photo_files.dng(RAMP, orientation=6, preview=PREVIEW, preview_size=(1200, 800))
    assert look(data) == Head("RAW", 0, 0)
    bare, seen, small = decode(data), decode(data, upright=True), decode(data, 100, upright=True)
    assert (bare.size, bare.format) == ((1200, 800), "RAW")
    assert (seen.size, small.size, full_size(small)) == ((800, 1200), (100, 150), (800, 1200))
    assert np.abs(np.asarray(small).mean(axis=(0, 1)) - (200, 30, 40)).max() < 3
    assert facts.of_picture(seen)["camera"] == "LEICA Q3"
    developed = decode(photo_files.dng(RAMP, orientation=8), upright=True)
    assert developed.size == (32, 48)
    # Darkest at the left, which is below once a camera that was held so is held upright.
    rows = np.asarray(developed.convert("L")).astype(int).mean(axis=1)
    assert rows[0] > rows[-1] + 50
    # The service decodes in a process that has the pixels of the model's input made there.
    data = photo_files.dng(RAMP, orientation=8)
    here = opened_here(data, look(data))
    here.load()
    assert upright(here).size == (32, 48)
    # A preview too small to see anything in is no picture.
    tiny = photo_files.dng(RAMP, preview=photo_files.jpeg(SCENE), preview_size=(160, 120))
    assert decode(tiny).size == (48, 32)


def test_a_heic_that_was_turned_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = SCENE.transpose(Image.Transpose.ROTATE_90)
    for data in (photo_files.heic(sideways, exif=exif.tobytes()), photo_files.heic(sideways)):
        bare, seen = decode(data), decode(data, upright=True)
        assert seen.size == bare.size
        assert seen.tobytes() == bare.tobytes()


def test_a_heic_or_raw_without_its_package_names_what_to_install(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pillow_heif", "rawpy"):
        missing = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / f"{name}.py").write_text(missing, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    decoding._end()
    cli.main(["index", "build", str(photos), "--output", str(tmp_path / "i"), *MODEL, "--json"])
    skipped = {one["id"]: one["reason"] for one in json.loads(capsys.readouterr().out)["skipped"]}
    assert sorted(skipped) == ["c.heic", "f.dng", "g.DNG"]
    assert all("pip install 'cn-clip-next[photos]'" in one for one in skipped.values())
    with served(Encoder("Emoji-Tiny", device="cpu")) as address:
        body = {"model": "tiny", "input": {"image": data_url((photos / "c.heic").read_bytes())}}
        answer = httpx.post(f"{address}/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert "pip install 'cn-clip-next[photos]'" in answer.json()["error"]["message"]
    decoding._end()


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIF"),
        (b"mif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"mif1\0\0\0\0miafheix", "HEIF"),
        (b"msf1\0\0\0\0", "HEIF"),
        (b"crx \0\0\0\1crx isom", "RAW"),
        (b"isom\0\0\0\0heic", None),
        (b"qt  \0\0\0\0qt  ", None),
    ],
)
def test_files_in_boxes_are_told_apart_by_their_brands(brands: bytes, kind: str | None) -> None:
    assert format_of((8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + b"heic" * 9) == kind


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(["c.heic", "d.avif", "e.tif", "g.DNG"]), damage=st.data())
def test_the_head_of_a_damaged_photo_is_read_without_an_error_of_python(kind: str, damage: st.DataObject) -> None:
    data = bytearray(MADE.setdefault(kind, FILES[kind]()))
    for _ in range(damage.draw(st.integers(1, 8))):
        data[damage.draw(st.integers(0, min(len(data), 600) - 1))] = damage.draw(st.integers(0, 255))
    try:
        head = look(bytes(data[: damage.draw(st.integers(0, len(data)))]))
    except DataError:
        return
    assert head is None or min(head.width, head.height) >= 0


MADE: dict[str, bytes] = {}


# --- limits


def large_jpeg(width: int, height: int) -> bytes:
    """A JPEG of one colour whose head says another size, and whose pixels are few: what is declared is what counts."""
    data = bytearray(photo_files.jpeg(Image.new("L", (16, 16))))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("size", "side", "counted"),
    [((8064, 6048), 512, 1008 * 756), ((16320, 12240), 512, 2040 * 1530), ((16320, 12240), None, 16320 * 12240)],
)
def test_pixels_are_counted_as_they_are_decoded(size: tuple[int, int], side: int | None, counted: int) -> None:
    assert num_decoded(Head("JPEG", *size), side) == counted
    assert num_decoded(Head("PNG", *size), side) == size[0] * size[1]


def test_a_photo_of_200_megapixels_is_seen_at_a_fraction_and_told_apart_from_a_bomb(
    recwarn: pytest.WarningsRecorder,
) -> None:
    photo = large_jpeg(16320, 12240)
    assert MOST_PIXELS < 16320 * 12240
    with opened(photo) as image:
        assert image.size == (16320, 12240)
    with pytest.raises(DataError, match=r"^a: not decoded: too large: 16320 x 12240 .*at most 178956970 are decoded$"):
        open_picture(photo, name="a")
    seen = open_picture(photo, name="a", draft_size=512)
    assert (seen.size, full_size(seen)) == ((2040, 1530), (16320, 12240))
    with pytest.raises(TooManyPixelsError, match=f"65000 x 65000 .*at most {MOST_JPEG_PIXELS}"):
        opened(large_jpeg(65000, 65000))
    assert not recwarn.list


def test_a_png_bomb_is_refused_with_the_limit_also_by_what_only_looks_at_it() -> None:
    data = bytearray(saved("PNG"))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    bomb = bytes(data)
    for look_at in (opened, lambda data: check_picture(data, "decode"), lambda data: shrunk(data, 9)):
        with pytest.raises(DataError, match=r"20000 x 20000 .*at most 178956970"):
            look_at(bomb)


def test_the_service_takes_photos_of_48_megapixels_by_default_and_says_its_limit(photos: Path) -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu", decode="auto", upright=True)
    stream = io.BytesIO()
    Image.new("L", (8064, 6048), 99).save(stream, "JPEG")
    Image.new("1", (8064, 6048)).save(png := io.BytesIO(), "PNG")
    with served(encoder) as address:
        body = {"model": "tiny", "input": [{"image": data_url(one)} for one in (stream.getvalue(), png.getvalue())]}
        answer = httpx.post(f"{address}/v1/embeddings", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        Image.new("1", (9000, 9000)).save(bomb := io.BytesIO(), "PNG")
        answer = httpx.post(
            f"{address}/v1/embeddings", json={"model": "tiny", "input": {"image": data_url(bomb.getvalue())}}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_too_large")
    assert f"at most {Limits().max_pixels} pixels" in answer.json()["error"]["message"]


def test_odd_pictures_are_taken_or_refused_in_one_sentence_and_pillow_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (100_000, 1), "red").save(folder / "line.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.heic").write_bytes(photo_files.heic(SCENE)[:-900])
    (folder / "cut.dng").write_bytes(photo_files.dng(RAMP)[:700])
    (folder / "locked.heic").write_bytes(b"%PDF-1.7 /Encrypt 3 0 R")
    clear = SCENE.quantize(7)
    clear.save(folder / "clear.png", transparency=bytes(range(0, 70, 10)))
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *MODEL, "--json"])
    assert [str(one.message) for one in said] == []
    assert caplog.messages == []
    result = json.loads(capsys.readouterr().out)
    assert result["num_items"] == 2
    reasons = {one["id"]: one["reason"] for one in result["skipped"]}
    assert sorted(reasons) == ["cut.dng", "cut.heic", "empty.jpg", "locked.heic"]
    assert reasons["empty.jpg"] == "the picture is empty (0 bytes)"
    assert [one for one in reasons.values() if "\n" in one or "<" in one] == []
