"""What `Encoder` takes for pictures and texts: arrays, tensors, open files, streams; and what it refuses, in words."""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CONFIGS, TEXT

from cn_clip.clip import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.clip.picture_arrays import as_picture
from cn_clip.errors import CnClipError, DataError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Tiny towers with the real vocabulary."""
    from dataclasses import replace

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Encoder(CLIP.from_config(replace(CONFIGS["vit"], text=replace(TEXT, vocab_size=21128))), device="cpu")


RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
ALPHA = np.dstack([COLOUR, RNG.integers(0, 256, (20, 30), dtype=np.uint8)])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


FORMS: dict[str, tuple[Any, Image.Image]] = {
    "array of bytes": (COLOUR, Image.fromarray(COLOUR)),
    "array of floats": (COLOUR / 255, Image.fromarray(COLOUR)),
    "array of float16": ((COLOUR / 255).astype(np.float16), Image.fromarray(COLOUR)),
    "array with alpha": (ALPHA, Image.fromarray(COLOUR)),
    "grey array": (GREY, Image.fromarray(GREY)),
    "grey array of three axes": (GREY[..., None], Image.fromarray(GREY)),
    "array upside down": (COLOUR[::-1], Image.fromarray(np.ascontiguousarray(COLOUR[::-1]))),
    "black and white": (GREY > 99, Image.fromarray(GREY > 99).convert("L")),
    "16 bits": (GREY.astype(np.uint16) * 257, Image.fromarray(GREY)),
    "16 bits, all small": (GREY.astype(np.uint16), Image.fromarray(GREY)),
    "tensor": (torch.from_numpy(COLOUR).permute(2, 0, 1), Image.fromarray(COLOUR)),
    "tensor of floats": (torch.from_numpy(COLOUR).permute(2, 0, 1) / 255, Image.fromarray(COLOUR)),
    "tensor with gradients": (
        (torch.from_numpy(COLOUR).permute(2, 0, 1) / 255).requires_grad_(),
        Image.fromarray(COLOUR),
    ),
    "grey tensor": (torch.from_numpy(GREY)[None], Image.fromarray(GREY)),
    "tensor with alpha": (torch.from_numpy(ALPHA).permute(2, 0, 1), Image.fromarray(COLOUR)),
    "buffer written to": (io.BytesIO(png(Image.fromarray(COLOUR))), Image.fromarray(COLOUR)),
    "bytearray": (bytearray(png(Image.fromarray(COLOUR))), Image.fromarray(COLOUR)),
    "memoryview": (memoryview(png(Image.fromarray(COLOUR))), Image.fromarray(COLOUR)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_row_of_the_picture_alone_and_in_a_list(encoder: Encoder, form: str) -> None:
    given_, image = FORMS[form]
    if isinstance(given_, io.BytesIO):
        given_.seek(0, io.SEEK_END)  # as PIL leaves it
    expected = encoder.encode_images([image])
    np.testing.assert_array_equal(encoder.encode_images(given_), expected)
    np.testing.assert_array_equal(encoder.encode_images([given_]), expected)


def test_bfloat16_tensors_are_pictures_to_their_precision(encoder: Encoder) -> None:
    tensor = torch.from_numpy(COLOUR).permute(2, 0, 1).to(torch.bfloat16) / 255
    assert (encoder.encode_images(tensor) @ encoder.encode_images(COLOUR).T).item() > 0.99


def test_an_open_file_is_a_picture_and_stays_open(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "狗.png"
    path.write_bytes(png(Image.fromarray(COLOUR)))
    expected = encoder.encode_images([path])
    with open(path, "rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(path.read_bytes())
        rows = encoder.encode_images([file, spooled, file])
        np.testing.assert_allclose(rows, np.repeat(expected, 3, axis=0), atol=1e-6)
        assert not file.closed


def test_a_batch_of_arrays_or_tensors_is_its_pictures(encoder: Encoder) -> None:
    batch = np.stack([COLOUR, 255 - COLOUR])
    expected = encoder.encode_images([COLOUR, 255 - COLOUR])
    np.testing.assert_array_equal(encoder.encode_images(batch), expected)
    np.testing.assert_array_equal(encoder.encode_images(torch.from_numpy(batch).permute(0, 3, 1, 2)), expected)
    assert encoder.encode_images(batch[:0]).shape == (0, 24)


def test_arrays_of_paths_are_lists_of_paths(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(Image.fromarray(COLOUR)))
    for paths in (np.array([str(path)] * 2), np.array([path, path], dtype=object)):
        assert encoder.encode_images(paths).shape == (2, 24)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4, 4), (3, 4)), ((4, 4, 3), (4, 4)), ((3, 5, 3), (3, 5)), ((1, 3, 1), (1, 3))],
)
def test_an_array_whose_shape_could_be_read_both_ways_is_height_width_channels(
    shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    image = as_picture(np.zeros(shape, np.uint8))
    assert (image.height, image.width) == expected


def test_a_tensor_whose_shape_could_be_read_both_ways_is_channels_height_width() -> None:
    image = as_picture(torch.zeros(3, 5, 3, dtype=torch.uint8))
    assert (image.height, image.width) == (5, 3)


REFUSED: dict[str, tuple[Any, str]] = {
    "channels first": (
        np.zeros((3, 8, 9), np.uint8),
        r"picture 0: an array of the shape \(3, 8, 9\); expected \(height",
    ),
    "channels first, the step": (np.zeros((3, 8, 9), np.uint8), r"channels are at the other end, give x\.transpose"),
    "channels last": (torch.zeros(8, 9, 3), r"a tensor of the shape \(8, 9, 3\).* give x\.permute\(2, 0, 1\)"),
    "two channels": (np.zeros((8, 9, 2), np.uint8), "with 1, 3 or 4 channels$"),
    "no pixels": (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
    "one axis": (np.zeros(9, np.uint8), r"shape \(9,\)"),
    "a number": (np.array(3.0), r"shape \(\)"),
    "NaN": (np.full((4, 4), np.nan), "floats from nan to nan; expected 0 to 1"),
    "normalised": (np.full((4, 4, 3), -1.7), "floats from -1.7 to -1.7; .* give them to encode_pixels"),
    "floats of 255": (np.full((4, 4), 255.0), "divide by 255"),
    "whole numbers": (np.full((4, 4), 300), "an array of int64, with values from 300 to 300; expected uint8"),
    "complex": (np.full((4, 4), 1j), "an array of complex128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_are_no_picture_are_refused_with_a_sentence(encoder: Encoder, case: str) -> None:
    given_, words = REFUSED[case]
    with pytest.raises(DataError, match=words) as caught:
        encoder.encode_images(given_)
    assert str(caught.value).startswith("picture 0: ")
    with pytest.raises(DataError, match=r"^picture 1: "):
        encoder.encode_images([COLOUR, given_])


def test_things_without_an_order_and_things_of_other_kinds_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("文")
    with open(tmp_path / "a.txt", encoding="utf-8") as text, pytest.raises(TypeError, match=r"a\.txt: .* mode 'rb'"):
        encoder.encode_images([text])  # type: ignore[list-item]
    for images in ({"a.png": 1}, {"a.png"}):
        with pytest.raises(TypeError, match=r"images: expected pictures in an order, got (dict|set); give a list"):
            encoder.encode_images(images)
    for nothing in (None, 3, object()):
        with pytest.raises(TypeError, match="images: expected a picture, or several, got"):
            encoder.encode_images(nothing)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="texts: expected a str or several in an order, got"):
            encoder.encode_texts(nothing)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="texts: expected a str or several in an order, got bytes"):
        encoder.encode_texts(b"abc")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a str, got float nan"):
        encoder.encode_texts(["狗", float("nan")])  # type: ignore[list-item]


def test_an_address_is_not_downloaded_and_the_message_says_so(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"https://example\.com/a\.png: is an address; nothing is downloaded here"):
        encoder.encode_images("https://example.com/a.png")


class Stream:
    """A generator of inputs that knows how far it has been read, and which fails when it is asked too early."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count, self.given, self.done, self.most_ahead = make, count, 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            self.given += 1
            self.most_ahead = max(self.most_ahead, self.given - self.done)
            yield self.make(number)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_stream_of_pictures_is_read_a_few_batches_ahead_and_never_made_a_list(
    encoder: Encoder, num_threads: int
) -> None:
    stream = Stream(lambda number: np.full((8, 8, 3), number % 256, np.uint8), 100)
    rows = []
    for batch in encoder.encode_image_batches(stream, batch_size=4, num_threads=num_threads):
        rows.append(batch)
        stream.done += len(batch)
    assert stream.given == stream.done == 100
    assert stream.most_ahead <= 4 * 4
    expected = encoder.encode_images([np.full((8, 8, 3), number, np.uint8) for number in range(100)], batch_size=4)
    np.testing.assert_array_equal(np.concatenate(rows), expected)
    np.testing.assert_array_equal(encoder.encode_images(iter(stream), batch_size=4), expected)


def test_a_stream_of_texts_is_read_a_window_ahead(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cn_clip.clip.encoder.SORTING_WINDOW", 10)
    stream = Stream(lambda number: "狗" * (number % 7), 95)
    rows = []
    for window in encoder.encode_text_windows(stream, batch_size=4):
        rows.append(window)
        stream.done += len(window)
    assert [len(window) for window in rows] == [10] * 9 + [5]
    assert stream.most_ahead <= 20
    np.testing.assert_allclose(
        np.concatenate(rows), encoder.encode_texts(["狗" * (number % 7) for number in range(95)]), atol=1e-6
    )


def test_what_a_stream_raises_comes_through(encoder: Encoder) -> None:
    def broken() -> Iterator[Any]:
        yield COLOUR
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encoder.encode_images(broken())

    def broken_texts() -> Iterator[str]:
        yield "狗"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encoder.encode_texts(broken_texts())


def test_the_number_in_a_message_counts_from_the_beginning_of_the_stream(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cn_clip.clip.encoder.SORTING_WINDOW", 4)
    with pytest.raises(TypeError, match=r"texts\[6\]: expected a str, got int"):
        encoder.encode_texts(iter(["狗"] * 6 + [3]))  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"texts\[5\]: is a picture as a data URL"):
        encoder.encode_texts(iter(["狗"] * 5 + ["data:image/png;base64,AAAA"]))


_SHAPES = st.lists(st.integers(0, 5), max_size=5)
_TYPES = st.sampled_from(["uint8", "bool", "uint16", "int8", "int64", "float16", "float32", "float64", "complex64"])


@given(shape=_SHAPES, dtype=_TYPES, seed=st.integers(0, 99), as_tensor=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_array_gives_unit_rows_or_a_sentence(
    encoder: Encoder, shape: list[int], dtype: str, seed: int, as_tensor: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice(
        [0, 1, 0.5, 255, 256, -1, 70000, np.nan, np.inf], tuple(shape), p=[0.3, 0.3, 0.2, *[0.2 / 6] * 6]
    )
    with np.errstate(all="ignore"):
        array = np.asarray(np.nan_to_num(values) if dtype[0] in "iu" else values).astype(dtype)
    given_: Any = torch.from_numpy(np.ascontiguousarray(array)) if as_tensor and dtype != "uint16" else array
    refusal = None
    try:
        rows = encoder.encode_images(given_)
    except CnClipError as error:
        refusal, rows = str(error), np.empty((0, 24), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert refusal is None or (refusal.startswith("picture ") and "; expected " in refusal)
