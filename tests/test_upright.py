"""Which way up a picture is: EXIF orientations, true ones and lies, for those who serve people and for the others."""

import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, features

from cn_clip import cli
from cn_clip.clip import Encoder, decoding
from cn_clip.clip.decoding import PIXELS as OF_PIXELS
from cn_clip.clip.decoding import DecodingProcess
from cn_clip.clip.orientation import full_size, orientation_of, upright
from cn_clip.clip.pictures import decode, open_picture
from cn_clip.clip.thumbnails import thumbnail
from cn_clip.clip.transforms import ImageTransform
from cn_clip.emoji_pack import load
from cn_clip.features.files import write_features
from cn_clip.index import jobs
from cn_clip.index.searching import renewal_hint
from cn_clip.retrieval import manifest
from cn_clip.retrieval.manifest import PictureFacts
from cn_clip.retrieval.store import open_index

Levels = NDArray[np.uint8]

# By the value of the tag: how a camera that was held so stores an upright picture, in rows and columns of numpy.
STORED: dict[int, Callable[[Levels], Levels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[:, ::-1],
}
# Noise: any turn shows.
LEVELS: Levels = np.random.default_rng(7).integers(0, 256, (24, 32, 3), dtype=np.uint8)
MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")


@pytest.fixture(autouse=True, scope="module")
def _end_processes() -> Iterator[None]:
    yield
    decoding._end()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Camera"
    return exif


def stored(levels: Levels, orientation: int, kind: str = "PNG", **given: Any) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](levels)))
    picture.save(stream, kind, **{"exif": exif_of(orientation), **given})
    return stream.getvalue()


# --- one picture


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("kind", "given"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_picture_of_every_orientation_is_seen_upright_and_without_asking_as_it_is_stored(
    kind: str, given: dict[str, Any], orientation: int
) -> None:
    data = stored(LEVELS, orientation, kind, **given)
    bare, seen = decode(data), decode(data, upright=True)
    np.testing.assert_array_equal(np.asarray(bare), STORED[orientation](LEVELS))
    np.testing.assert_array_equal(np.asarray(seen), LEVELS)
    # Whoever asks again does not turn it once more; what else EXIF says stays.
    assert (orientation_of(seen), seen.format, upright(seen)) == (1, bare.format, seen)
    assert seen.getexif()[0x010F] == "Camera"


@pytest.mark.parametrize("orientation", STORED)
def test_a_tiff_which_pillow_itself_turns_is_not_turned_twice(orientation: int) -> None:
    data = stored(LEVELS, orientation, "TIFF")
    for seen in (decode(data), decode(data, upright=True)):
        np.testing.assert_array_equal(np.asarray(seen), LEVELS)


@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_decoded_at_a_fraction_is_upright_too_and_knows_its_whole_size(orientation: int) -> None:
    large = np.kron(LEVELS, np.ones((8, 8, 1), dtype=np.uint8))
    seen = decode(stored(large, orientation, "JPEG", quality=95), 24, upright=True)
    assert (seen.size, full_size(seen)) == ((32, 24), (256, 192))
    assert np.abs(np.asarray(seen).astype(int) - LEVELS).mean() < 12
    assert full_size(decode(stored(large, orientation, "JPEG"), upright=True)) == (256, 192)


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_the_transformations_of_an_avif_are_followed_once(orientation: int) -> None:
    """Pillow writes them for an orientation, and reads them as one."""
    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    large = np.kron(LEVELS, np.ones((8, 8, 1), dtype=np.uint8))
    seen = decode(stored(large, orientation, "AVIF", quality=95), upright=True)
    assert seen.size == (256, 192)
    assert np.abs(np.asarray(seen).astype(int) - large).mean() < 20


@pytest.mark.parametrize("lie", [0, 9, 700, 65535])
def test_an_orientation_that_cannot_be_is_passed_over(lie: int) -> None:
    data = stored(LEVELS, 1, exif=exif_of(lie))
    np.testing.assert_array_equal(np.asarray(decode(data, upright=True)), LEVELS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:.*[Tt]ag.*:UserWarning")
@settings(deadline=None, max_examples=60)
@given(at=st.lists(st.tuples(st.integers(6, 60), st.integers(0, 255)), max_size=6), end=st.integers(0, 80))
def test_damaged_exif_never_costs_the_picture(at: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(exif_of(6).tobytes())
    for place, value in at:
        if place < len(damaged):
            damaged[place] = value
    picture = Image.fromarray(LEVELS)
    picture.info["exif"] = bytes(damaged[:end])
    seen = upright(picture)
    assert seen.size in ((32, 24), (24, 32))
    assert orientation_of(seen) == 1


def test_a_picture_is_turned_each_time_that_it_is_opened_and_stays_what_it_is() -> None:
    with Image.open(io.BytesIO(stored(LEVELS, 6))) as image:
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(open_picture(image, name="a", upright=True)), LEVELS)
        assert image.getexif()[ExifTags.Base.Orientation] == 6


def test_a_picture_that_was_turned_by_pil_is_not_turned_again() -> None:
    from PIL import ImageOps

    with Image.open(io.BytesIO(stored(LEVELS, 6))) as image:
        turned = ImageOps.exif_transpose(image)
        np.testing.assert_array_equal(np.asarray(open_picture(turned, name="a", upright=True)), LEVELS)
        np.testing.assert_array_equal(np.asarray(open_picture(image, name="a", upright=True)), LEVELS)


# --- who sees it upright, and who does not


def test_the_encoder_turns_pictures_only_when_asked_and_the_process_of_the_service_does_too() -> None:
    picture = np.asarray(Image.open(io.BytesIO(load()[0].picture)).convert("RGB"))
    sideways, plain = stored(picture, 6), stored(picture, 1)
    people, bare = Encoder("Emoji-Tiny", device="cpu", upright=True), Encoder("Emoji-Tiny", device="cpu")
    rows = people.encode_images([sideways, plain])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert (bare.encode_images([sideways])[0] @ rows[1]) < 0.9
    expected = ImageTransform(16).array(Image.fromarray(picture)).tobytes()
    process = DecodingProcess(ImageTransform(16), upright=True, num_bytes=len(expected), spare_bytes=1 << 30)
    try:
        assert process.ask(sideways, 3, 10**6) == (OF_PIXELS, expected)
    finally:
        process.close()
        process.reap()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawings, each stored in one of the eight orientations."""
    folder = tmp_path_factory.mktemp("photos")
    for number, one in enumerate(load()[:12]):
        levels = np.asarray(Image.open(io.BytesIO(one.picture)).convert("RGB").resize((64, 48)))
        (folder / f"{number:02}.png").write_bytes(stored(levels, number % 8 + 1))
        (folder / f"{number:02}.upright").write_bytes(stored(levels, 1))
    return folder


@pytest.fixture(scope="module")
def built(photos: Path) -> Path:
    cli.main(["index", "build", str(photos), "--output", str(photos / "i"), *MODEL])
    return photos / "i"


def test_an_index_holds_pictures_as_people_see_them_and_says_so(built: Path, photos: Path) -> None:
    index = open_index(built)
    assert index.pictures == PictureFacts(upright=True, decode="auto")
    expected = Encoder("Emoji-Tiny", device="cpu").encode_images(sorted(photos.glob("*.upright")))
    np.testing.assert_allclose([index.vector(f"{one:02}.png") for one in range(12)], expected, atol=1e-5)
    for number in range(12):
        assert {name: index.metadata(f"{number:02}.png")[name] for name in ("width", "height")} == {
            "width": 64,
            "height": 48,
        }
        small = index.thumbnail(f"{number:02}.png")
        assert small is not None
        assert Image.open(io.BytesIO(small)).size == (64, 48)


def test_a_query_picture_is_seen_as_those_of_its_index(
    built: Path, old: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def best(index: Path) -> dict[str, Any]:
        capsys.readouterr()
        cli.main(["search", str(index), "--image", str(photos / "05.png"), "--k", "1", "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["hits"][0]
        return found

    assert best(built)["id"] == "05.png"
    assert best(built)["score"] == pytest.approx(1, abs=1e-4)
    # An old one is asked as its pictures were seen.
    assert open_index(old).pictures is None
    assert best(old)["id"] == "05.png"
    assert best(old)["score"] == pytest.approx(1, abs=1e-4)


@pytest.fixture
def old(photos: Path, tmp_path: Path) -> Path:
    """An index as an earlier version made it: pictures as they are stored, and no word of that."""
    folder = tmp_path / "old"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "NEW_PICTURES", PictureFacts())
        cli.main(["index", "build", str(photos), "--output", str(folder), *MODEL])
    manifest.write(folder, replace(manifest.read(folder), pictures=None))
    return folder


def test_an_old_index_says_how_it_is_renewed_and_that_computes_what_was_sideways_and_nothing_else(
    old: Path, built: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_index(old)
    stored_rows = Encoder("Emoji-Tiny", device="cpu").encode_images(sorted(photos.glob("*.png")))
    np.testing.assert_allclose([before.vector(one) for one in before.ids], stored_rows, atol=1e-5)
    capsys.readouterr()
    cli.main(["search", str(old), "--image", str(photos / "05.png")])
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if "--renew" in line]
    command = shlex.split(hint[hint.index("cn-clip index build") :])[1:]
    assert command == ["index", "build", str(photos), "--output", str(old), "--renew"]
    words = PictureFacts(ocr=True)  # as --ocr notes it
    assert renewal_hint(words, str(photos), old) == renewal_hint(None, str(photos), old) == hint
    assert renewal_hint(replace(words, upright=True), str(photos), old) == ""
    cli.main([*command, "--json"])
    done = json.loads(capsys.readouterr().out)
    # 12 pictures, of which numbers 0 and 8 lie as they are seen.
    assert (done["encoded"], done["reused"] + done["unchanged"]) == (10, 2)
    renewed, fresh = open_index(old), open_index(built)
    assert renewed.pictures == PictureFacts(upright=True, decode="exact")
    assert sorted(renewed.ids) == sorted(fresh.ids)
    for one in fresh.ids:
        np.testing.assert_allclose(renewed.vector(one), fresh.vector(one), atol=1e-5)
        assert renewed.metadata(one) == fresh.metadata(one)
    cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["num_items"] == 12


def test_equal_pictures_are_renewed_alike(
    photos: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "p", tmp_path / "i"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(photos / "05.png", folder / name)
    command = ["index", "build", str(folder), "--output", str(index), *MODEL]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "NEW_PICTURES", PictureFacts())
        cli.main(command)
    cli.main([*command, "--renew", "--batch-size", "1"])
    for one in ("a.png", "b.png", "c.png"):
        np.testing.assert_allclose(open_index(index).vector(one), open_index(built).vector("05.png"), atol=1e-5)


def test_another_way_of_decoding_computes_all_again_and_without_renew_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", "build", str(photos), "--output", str(tmp_path / "i"), *MODEL]
    cli.main(command)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*command, "--decode", "exact"])
    assert "decoded with auto" in capsys.readouterr().err
    cli.main([*command, "--decode", "exact", "--renew", "--json"])
    assert json.loads(capsys.readouterr().out)["encoded"] == 12
    assert open_index(tmp_path / "i").pictures == PictureFacts(upright=True, decode="exact")


def test_vectors_of_a_feature_file_are_not_renewed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(tmp_path / "f.jsonl", "image_id", [([1, 2], np.eye(256, dtype=np.float32)[:2])])
    cli.main(["index", "build", str(tmp_path / "f.jsonl"), "--output", str(tmp_path / "i"), *MODEL])
    assert open_index(tmp_path / "i").pictures == PictureFacts()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["index", "build", str(photos), "--output", str(tmp_path / "i"), "--keep-missing", "--renew", *MODEL])
    assert "came from features" in capsys.readouterr().err
    assert open_index(tmp_path / "i").pictures == PictureFacts()


def test_a_thumbnail_shrinks_until_the_store_has_room_for_it() -> None:
    noise = Image.effect_noise((800, 600), 90).convert("RGB")
    free, small = thumbnail(noise, 512), thumbnail(noise, 512, 49_149)
    assert Image.open(io.BytesIO(free)).size == (512, 384)
    assert len(free) > 49_149 >= len(small)
    width, height = Image.open(io.BytesIO(small)).size
    assert 200 < width < 512
    assert width / height == pytest.approx(4 / 3, abs=0.02)
