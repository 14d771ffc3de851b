"""From bytes to pixels: the values, where they are written, and what decode="fast" changes and leaves."""

import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_model

from cn_clip.clip import Encoder, picture_files
from cn_clip.clip import pictures as clip_pictures
from cn_clip.clip.backends.base import AnyPixels, Pixels
from cn_clip.clip.pictures import data_url_bytes, decode, decoded_batches, float_room, open_picture
from cn_clip.clip.transforms import MEAN, STD, Decode, ImageTransform, normalised
from cn_clip.data.lmdb_store import SplitWriter
from cn_clip.data.pictures import LmdbPictures, PictureFiles, batches, load_picture
from cn_clip.errors import ConfigError, DataError

# One level of 255 in the units of the pixels, at most over the channels.
LEVEL = 1 / 255 / min(STD)


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft waves of colour with a hard edge in it, as photos have both."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x) * np.cos(y)], axis=-1)
    pixels = (waves * 100 + 128).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 :] = (250, 240, 20)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, resolution: int, how: Any) -> Pixels:
    transform = ImageTransform(resolution, how)
    return transform.array(open_picture(data, name="a", draft_size=transform.draft_size))


# --- values


def test_every_level_of_every_channel_is_normalised_exactly() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = ImageTransform(16).array(Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1)))
    for channel, plane in enumerate((levels, levels[::-1], levels.T)):
        mean, std = np.float32(MEAN[channel]), np.float32(STD[channel])
        expected = [(np.float32(level) / np.float32(255) - mean) / std for level in plane.flatten()]
        assert pixels[channel].flatten().tolist() == [float(value) for value in expected]
    assert pixels[0, 0, 0] == np.float32(-1.7922626)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous


def test_pixels_are_written_where_they_are_wanted() -> None:
    transform, batch = ImageTransform(20), np.full((3, 3, 20, 20), 7, dtype=np.float32)
    written = transform.array(scene(50, 30), batch[1])
    assert np.shares_memory(written, batch)
    np.testing.assert_array_equal(batch[1], transform.array(scene(50, 30)))
    assert (batch[[0, 2]] == 7).all()


def any_picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise of a mode, over the range of values that `in_8_bits` takes."""
    random = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(kind))
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@settings(deadline=None)
@given(
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resolution=st.integers(1, 24),
    how=st.sampled_from(["exact", "fast", "reference"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_normalised_bytes_are_the_pixels_to_the_last_bit(
    mode: str, size: tuple[int, int], resolution: int, how: Decode, seed: int
) -> None:
    transform, picture = ImageTransform(resolution, how), any_picture(mode, *size, seed)
    pixels, batch = transform.array(picture), np.full((2, 3, resolution, resolution), 7, dtype=np.uint8)
    written = transform.bytes(picture, batch[1])
    assert written.dtype == np.uint8
    assert np.shares_memory(written, batch)
    assert (batch[0] == 7).all()
    np.testing.assert_array_equal(transform.bytes(picture), batch[1])
    found = normalised(torch.from_numpy(batch))
    assert found.dtype == torch.float32
    assert found[1].numpy().tobytes() == pixels.tobytes()


def test_pixels_that_are_no_bytes_are_normalised_already() -> None:
    pixels = torch.rand(1, 3, 2, 2, dtype=torch.float16)
    assert normalised(pixels) is pixels


def test_bytes_of_changed_steps_are_refused() -> None:
    transform = ImageTransform(4)
    del transform.transforms[-1]
    for make in (transform.array, transform.bytes):
        with pytest.raises(ConfigError, match="transforms: the steps were changed"):
            make(scene(8, 8))


# --- batches


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_batches_hold_what_was_written_for_each_number(num_threads: int) -> None:
    def load(number: int, out: Pixels) -> str:
        out[:] = number
        return f"{number}"

    found = list(decoded_batches(load, range(3, 10), float_room((3, 2, 2)), 3, num_threads))
    assert [keys for keys, _ in found] == [["3", "4", "5"], ["6", "7", "8"], ["9"]]
    assert [pixels.shape for _, pixels in found] == [(3, 3, 2, 2), (3, 3, 2, 2), (1, 3, 2, 2)]
    assert [pixels.mean(axis=(1, 2, 3)).tolist() for _, pixels in found] == [[3, 4, 5], [6, 7, 8], [9]]
    assert list(decoded_batches(load, range(4, 4), float_room((3, 2, 2)), 3, num_threads)) == []


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (64, 16)])
def test_by_default_there_is_a_thread_a_core(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_pictures, "usable_cores", lambda: cores)
    together = threading.Barrier(threads)

    def load(number: int, out: AnyPixels) -> str:
        together.wait(60)  # until so many threads are here; breaks if there are fewer
        return threading.current_thread().name

    ((names, _),) = decoded_batches(load, range(2 * threads), float_room((3, 1, 1)), 2 * threads, None)
    assert len(set(names)) == threads


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_comes_after_the_batches_before_it(num_threads: int) -> None:
    def load(number: int, out: Pixels) -> int:
        if number == 3:
            raise DataError("number 3")
        return number

    found = decoded_batches(load, range(6), float_room((3, 1, 1)), 2, num_threads)
    assert next(found)[0] == [0, 1]
    with pytest.raises(DataError, match="number 3"):
        next(found)


# --- fast


@pytest.mark.parametrize(
    ("size", "resolution", "decoded"),
    [
        ((100, 80), 41, (100, 80)),
        ((100, 80), 40, (50, 40)),
        ((101, 81), 40, (51, 41)),
        ((100, 80), 21, (50, 40)),
        ((100, 80), 20, (25, 20)),
        ((100, 80), 10, (13, 10)),
        ((100, 80), 1, (13, 10)),
        ((400, 20), 16, (400, 20)),
        ((7, 5), 16, (7, 5)),
        ((1, 1), 1, (1, 1)),
    ],
)
def test_jpegs_are_decoded_at_the_smallest_fraction_that_leaves_both_sides_long_enough(
    size: tuple[int, int], resolution: int, decoded: tuple[int, int]
) -> None:
    data = encoded(scene(*size))
    assert decode(data, resolution).size == decoded
    assert decode(data).size == size


@pytest.mark.parametrize("resolution", [32, 33, 90])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_not_twice_as_long_as_the_model_needs_is_bit_identical(mode: str, resolution: int) -> None:
    data = encoded(scene(63, 80, mode), quality=85)
    np.testing.assert_array_equal(pixels_of(data, resolution, "fast"), pixels_of(data, resolution, "exact"))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_bit_identical_at_any_size(file_format: str) -> None:
    data = encoded(scene(300, 200), file_format)
    np.testing.assert_array_equal(pixels_of(data, 16, "fast"), pixels_of(data, 16, "exact"))


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (320, 240))]}),
    ],
)
@pytest.mark.parametrize(("factor", "most", "mean"), [(2, 42, 0.7), (4, 25, 0.8), (8, 24, 1.2)])
def test_fast_pixels_differ_by_few_levels_of_255_and_at_edges_by_more(
    mode: str, file_format: str, options: dict[str, Any], factor: int, most: float, mean: float
) -> None:
    """Largest with colour at half resolution: 39.8, 23 and 22 levels at an edge, 0.59, 0.69 and 1.04 on average."""
    data = encoded(scene(640, 480, mode), file_format, quality=90, **options)
    resolution = 480 // factor
    difference = np.abs(pixels_of(data, resolution, "fast") - pixels_of(data, resolution, "exact")) / LEVEL
    assert 5 < difference.max() < most
    assert 0.2 < difference.mean() < mean


def test_the_rotation_of_exif_is_ignored_either_way() -> None:
    plain, exif = scene(200, 120), Image.Exif()
    exif[0x0112] = 6
    for how in ("exact", "fast"):
        rotated = pixels_of(encoded(plain, exif=exif), 30, how)
        np.testing.assert_array_equal(rotated, pixels_of(encoded(plain), 30, how))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.98, 0.5, 0.1])
def test_a_jpeg_cut_short_is_an_error_also_when_few_of_its_pixels_are_needed(kept: float, progressive: bool) -> None:
    whole = encoded(scene(640, 480), progressive=progressive)
    cut = whole[: int(len(whole) * kept)]
    with pytest.raises(DataError, match=r"^a: not a picture that can be decoded \(.*(truncated|broken)"):
        open_picture(cut, name="a", draft_size=1)
    with pytest.raises(DataError, match=rf"^b: the picture of {len(cut)} bytes does not decode \(.*(truncated|broken)"):
        load_picture(cut, "b", ImageTransform(1, "fast").array, draft_size=1)


def test_pixels_are_bounded_by_what_is_decoded_and_for_a_jpeg_by_what_it_declares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(scene(320, 240))
    monkeypatch.setattr(picture_files, "MOST_JPEG_PIXELS", 320 * 240)
    assert open_picture(data, name="a", draft_size=30).size == (40, 30)
    monkeypatch.setattr(picture_files, "MOST_JPEG_PIXELS", 320 * 240 - 1)
    with pytest.raises(DataError, match=r"a: not decoded: .*too large: 320 x 240 .* at most 76799 are decoded$"):
        open_picture(data, name="a", draft_size=30)


def test_a_pil_picture_is_left_as_it_is() -> None:
    encoder = Encoder(tiny_model(), device="cpu", decode="fast")
    with Image.open(io.BytesIO(encoded(scene(640, 480)))) as lazily_opened:
        rows = encoder.encode_images([lazily_opened])
        assert lazily_opened.size == (640, 480)
    exact = Encoder(tiny_model(), device="cpu").encode_images([encoded(scene(640, 480))])
    np.testing.assert_array_equal(rows, exact)


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_the_encoder_and_the_datasets_decode_fast_alike(tmp_path: Path, num_threads: int) -> None:
    encoder = Encoder(tiny_model(), device="cpu", decode="fast")
    resolution = encoder.backend.resolution
    pictures = [encoded(scene(20 * number + 30, 200)) for number in range(12)]
    expected = np.stack([pixels_of(data, resolution, "fast") for data in pictures])
    assert (expected != np.stack([pixels_of(data, resolution, "exact") for data in pictures])).any()

    with SplitWriter(tmp_path / "split") as writer:
        for number, data in enumerate(pictures):
            (tmp_path / f"{number}.jpg").write_bytes(data)
            writer.put_image(f"{number:02}", base64.b64encode(data))
    paths = [tmp_path / f"{number}.jpg" for number in range(12)]
    for source in (LmdbPictures(tmp_path / "split" / "imgs"), PictureFiles(paths)):
        found = [pixels for _, pixels in batches(source, encoder.transform, 5, num_threads)]
        np.testing.assert_array_equal(np.concatenate(found), expected)
    later = [pixels for _, pixels in batches(PictureFiles(paths), encoder.transform, 5, num_threads, first=10)]
    np.testing.assert_array_equal(np.concatenate(later), expected[10:])

    rows = encoder.encode_images(pictures, batch_size=5, num_threads=num_threads)
    np.testing.assert_array_equal(rows, encoder.encode_images(paths, batch_size=5, num_threads=num_threads))
    np.testing.assert_allclose(rows, encoder.backend.encode_pixels(expected), atol=1e-6)


def test_a_picture_that_is_not_there_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "nope.jpg"
    with pytest.raises(DataError) as caught:
        open_picture(path, name=str(path))
    assert str(caught.value) == f"{path}: no such file"


def test_other_ways_of_decoding_are_refused() -> None:
    for make in (lambda: ImageTransform(16, "quick"), lambda: Encoder(tiny_model(), decode="quick")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="decode: expected exact, auto, fast, reference, got 'quick'"):
            make()


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3, 196_608, 196_609, 393_217])
def test_a_long_data_url_is_read_piece_by_piece_and_as_strictly(num_bytes: int) -> None:
    data = bytes(range(256)) * (num_bytes // 256 + 1)
    url = f"data:;base64,{base64.b64encode(data[:num_bytes]).decode()}"
    pieces: list[bytes] = []
    assert data_url_bytes(url, pieces.append) == data[:num_bytes]
    assert pieces == [data[start : start + 196_608] for start in range(0, num_bytes - 196_608, 196_608)]
    for wrong in (f"{url}*", f"{url}A", f"{url[:13]}={url[13:]}A", f"{url[:13]}====", f"{url}\n"):
        with pytest.raises(DataError, match="not valid base64"):
            data_url_bytes(wrong)
