"""Batches that are computed ahead, as on CUDA: the same rows, names and errors as one batch at a time."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cn_clip.clip import Encoder
from cn_clip.clip import encoder as encoders
from cn_clip.clip.backends.base import AnyPixels, Parts, Rows, rows_ahead
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.clip.transforms import ImageTransform, write_pixels
from cn_clip.data.lmdb_store import SplitWriter
from cn_clip.data.pictures import LmdbPictures
from cn_clip.errors import DataError, NotFiniteError
from cn_clip.eval import extract_features
from cn_clip.features import extraction
from cn_clip.index import build
from cn_clip.retrieval.store import open_index
from cn_clip.serve.batching import Batcher, Metrics
from cn_clip.serve.limits import Limits
from cn_clip.serve.runner import Picture, Runner, Text
from cn_clip.serve.schemas import RefusalError

TEXTS = ["皮卡丘", "小火龙" * 9, "", "a", "妙蛙种子 和 杰尼龟", "皮卡丘", "狗", "雪地"]


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's backend is used on the CPU as on CUDA."""
    opened = TorchBackend.__init__

    def as_on_cuda(self: TorchBackend, *args: Any, **settings: Any) -> None:
        opened(self, *args, **settings)
        self.facts = replace(self.facts, pixels="uint8", is_async=True)

    monkeypatch.setattr(TorchBackend, "__init__", as_on_cuda)


# --- order


@given(count=st.integers(0, 6), broken=st.integers(0, 6), where=st.sampled_from(["input", "start", "rows", "nowhere"]))
def test_rows_come_in_order_with_one_batch_ahead_and_an_error_after_the_rows_before_it(
    count: int, broken: int, where: str
) -> None:
    log: list[tuple[str, int]] = []

    def batches() -> Iterator[tuple[str, Any]]:
        for number in range(count):
            if (where, broken) == ("input", number):
                raise DataError("broken")
            yield f"batch {number}", np.array([number])

    def start(inputs: Any) -> Callable[[], Rows]:
        number = int(inputs[0])
        log.append(("start", number))
        if (where, broken) == ("start", number):
            raise DataError("broken")

        def rows() -> Rows:
            log.append(("rows", number))
            if (where, broken) == ("rows", number):
                raise DataError("broken")
            return np.float32([[number]])

        return rows

    found, fails = [], where != "nowhere" and broken < count
    try:
        for name, rows in rows_ahead(batches(), start):
            found.append((name, rows.tolist()))
        assert not fails
    except DataError:
        assert fails
    last = broken if fails else count
    assert found == [(f"batch {number}", [[number]]) for number in range(last)]
    for number in range(last - 1):  # while the rows of a batch are waited for, the next one is computed
        assert log.index(("rows", number)) == log.index(("start", number + 1)) + 1


# --- Encoder


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_encoder_gives_the_same_rows_with_bytes_and_a_batch_ahead(
    batch_size: int, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "SORTING_WINDOW", 5)
    fast = Encoder("Emoji-Tiny", device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr(encoders, "SORTING_WINDOW", 5)
    plain, images = Encoder("Emoji-Tiny", device="cpu"), [picture(number) for number in range(7)]
    assert (fast.room(2).dtype, plain.room(2).dtype) == (np.uint8, np.float32)
    assert fast.room(2).shape == (2, 3, 64, 64)
    for one in (fast, plain):
        pixels = one.room(2)
        for image, out in zip(images, pixels, strict=False):
            write_pixels(one.transform, image, out)
        np.testing.assert_array_equal(one.encode_pixels(pixels), plain.encode_images(images[:2]))
    for encode in ("encode_images", "encode_texts"):
        inputs: Any = images if encode == "encode_images" else TEXTS
        told: list[int] = []
        expected = getattr(plain, encode)(inputs, batch_size=batch_size)
        np.testing.assert_array_equal(getattr(fast, encode)(inputs, batch_size=batch_size), expected)
        assert len(np.unique(expected, axis=0)) > 5
    windows = list(fast.encode_text_windows(TEXTS, batch_size=batch_size, advance=told.append))
    assert [len(rows) for rows in windows] == [5, 3]
    assert sum(told) == 8
    np.testing.assert_array_equal(np.concatenate(windows), plain.encode_texts(TEXTS, batch_size=batch_size))
    assert fast.encode_images([]).shape == fast.encode_texts([]).shape == (0, plain.embed_dim)


def test_pixels_of_a_transform_of_its_own_stay_normalised_floats(ahead: None) -> None:
    class Brighter(ImageTransform):
        def array(self, image: Image.Image, out: Any = None) -> Any:
            return super().array(image.point(lambda level: min(255, 2 * level)), out)

    backend = Encoder("Emoji-Tiny", device="cpu").backend
    encoder = Encoder(Parts(backend, Brighter(backend.resolution), ChineseTexts(52)))
    assert encoder.room(1).dtype == np.float32
    pixels = Brighter(backend.resolution).array(picture(0))
    np.testing.assert_array_equal(encoder.encode_images([picture(0)]), backend.encode_pixels(pixels[None]))


def without_vector(monkeypatch: pytest.MonkeyPatch, method: str, is_wrong: Callable[[Any], bool]) -> None:
    """The backend has no vector for some inputs, which it says when their rows are asked for."""
    start = getattr(TorchBackend, method)

    def starting(self: TorchBackend, inputs: Any) -> Callable[[], Rows]:
        wrong, rows = [n for n, one in enumerate(inputs) if is_wrong(one)], start(self, inputs)

        def wait() -> Rows:
            if wrong:
                raise NotFiniteError("row", wrong)
            found: Rows = rows()
            return found

        return wait

    monkeypatch.setattr(TorchBackend, method, starting)


def test_the_picture_and_the_text_without_a_vector_are_named(ahead: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    black = Image.new("RGB", (64, 64))
    without_vector(monkeypatch, "start_pixels", lambda pixels: not pixels.any())
    images = [picture(number) for number in range(7)]
    with pytest.raises(NotFiniteError, match="picture 4: ") as caught:
        encoder.encode_images([*images[:4], black, black, *images], batch_size=3)
    assert caught.value.positions == [4, 5]
    without_vector(monkeypatch, "start_tokens", lambda token_ids: (token_ids != 0).sum() > 20)
    with pytest.raises(NotFiniteError, match="text 1 \\('小火龙") as caught:
        encoder.encode_texts(TEXTS, batch_size=2)
    assert caught.value.positions == [1]


# --- the service


def test_the_service_answers_the_same_with_bytes(ahead: None, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(3)).decode()

    def answered() -> Rows:
        async def main() -> Rows:
            runner = Runner("Emoji-Tiny", lambda: Encoder("Emoji-Tiny", device="cpu"), Limits(), Metrics())
            runner.start()
            try:
                await runner.opened.wait()
                rows, _ = await runner.embed([Picture(url, "input"), Text("狗")])
                return rows
            finally:
                await runner.stop()

        return asyncio.run(main())

    found = answered()
    monkeypatch.undo()
    np.testing.assert_array_equal(found, answered())


def test_the_service_begins_a_batch_before_it_waits_for_the_one_before_and_no_more() -> None:
    begun, may_end, fetched = list[int](), threading.Event(), list[int]()

    def compute(items: Sequence[int]) -> Callable[[], Rows]:
        begun.extend(items)

        def wait() -> Rows:
            assert may_end.wait(60)
            fetched.extend(items)
            if items[0] == 2:
                raise NotFiniteError("row", [0])
            return np.array(items, dtype=np.float32)[:, None]

        return wait

    async def main() -> list[Any]:
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as fetcher:
            sizes: dict[str, Any] = {"max_batch": 1, "max_wait": 0.0}
            batcher = Batcher("numbers", compute, thread, fetcher=fetcher, in_flight=lambda: 2, **sizes)
            running = asyncio.ensure_future(batcher.run())
            answers = [asyncio.ensure_future(batcher.rows([number])) for number in (1, 2, 3, 4)]
            await asyncio.sleep(0.2)
            in_hand, since = (list(begun), list(fetched)), batcher.computing_since
            may_end.set()
            rows = await asyncio.gather(*answers, return_exceptions=True)
            done_since = batcher.computing_since
            running.cancel()
            await asyncio.wait((running,))
        assert in_hand == ([1, 2], [])
        assert since is not None
        assert done_since is None
        return rows

    first, second, *others = asyncio.run(main())
    assert isinstance(second, RefusalError)
    assert second.code == "not_finite"
    assert [float(row[0][0]) for row in (first, *others)] == [1, 3, 4]
    assert begun == fetched == [1, 2, 3, 4]


# --- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "pictures").mkdir()
    with SplitWriter(folder / "split") as writer:
        for number in range(7):
            writer.put_image(number, base64.urlsafe_b64encode(png(number)))
    for name, number in (("a", 0), ("b", 1), ("c", 0), ("d", 2), ("e", 1), ("f", 3), ("g", 4)):  # some come twice
        (folder / "pictures" / f"{name}.png").write_bytes(png(number))
    (folder / "pictures" / "a_broken.png").write_bytes(png(5)[:90])
    lines = ({"text_id": number, "text": text, "image_ids": [0]} for number, text in enumerate(TEXTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def extract(folder: Path, output: Path) -> list[bytes]:
    output.mkdir()
    paths = [output / "images.jsonl", output / "texts.jsonl"]
    flags = {
        "image-data": folder / "split" / "imgs",
        "text-data": folder / "texts.jsonl",
        "image-feat-output-path": paths[0],
        "text-feat-output-path": paths[1],
        "resume": "Emoji-Tiny",
        "device": "cpu",
        "img-batch-size": 3,
        "text-batch-size": 2,
    }
    kinds = ["--extract-image-feats", "--extract-text-feats"]
    extract_features.main([*kinds, *(f"--{name}={value}" for name, value in flags.items())])
    return [path.read_bytes() for path in paths]


def test_extraction_ahead_writes_the_same_files(
    folder: Path, tmp_path: Path, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SORTING_WINDOW", 5)
    rows = extract(folder, tmp_path / "ahead")
    monkeypatch.undo()
    monkeypatch.setattr(extraction, "SORTING_WINDOW", 5)
    assert rows == extract(folder, tmp_path / "plain")


def test_an_index_built_ahead_holds_the_same_vectors(
    folder: Path, tmp_path: Path, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(name: str) -> Any:
        command = [str(folder / "pictures"), "--output", str(tmp_path / name), "--model", "Emoji-Tiny", "--device=cpu"]
        build.main([*command, "--batch-size=3"])
        return open_index(tmp_path / name)

    found = built("ahead")
    monkeypatch.undo()
    expected = built("plain")
    assert sorted(found.ids) == sorted(expected.ids) == [f"{name}.png" for name in "abcdefg"]
    for one in expected.ids:
        np.testing.assert_array_equal(found.vector(one), expected.vector(one))
        assert found.metadata(one) == expected.metadata(one)


def test_rows_before_a_picture_that_cannot_be_read_are_there_when_it_is_due(tmp_path: Path, ahead: None) -> None:
    with SplitWriter(tmp_path / "split") as writer:
        for number in range(6):
            writer.put_image(number, base64.urlsafe_b64encode(png(number)[: None if number != 4 else 90]))
    encoder = Encoder("Emoji-Tiny", device="cpu")
    pictures = LmdbPictures(tmp_path / "split" / "imgs")
    rows = extraction.picture_rows(pictures, encoder, names=pictures.ids, batch_size=2, num_workers=1)
    expected = encoder.encode_images([picture(number) for number in range(4)], batch_size=2)
    np.testing.assert_array_equal(np.concatenate([next(rows), next(rows)]), expected)
    with pytest.raises(DataError, match="image id 4: the picture of 90 bytes does not decode"):
        next(rows)


@pytest.mark.parametrize("first", [0, 2])
def test_the_picture_of_an_extraction_without_a_vector_is_named(
    first: int, folder: Path, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pictures = Encoder("Emoji-Tiny", device="cpu"), LmdbPictures(folder / "split" / "imgs")
    wrong = ImageTransform(encoder.resolution).bytes(picture(5))
    without_vector(monkeypatch, "start_pixels", lambda pixels: np.array_equal(pixels, wrong))
    names = [f"picture of {number}" for number in pictures.ids]
    sizes = {"batch_size": 2, "num_workers": 1, "first": first}
    with pytest.raises(NotFiniteError, match="image_id 'picture of 5': "):
        list(extraction.picture_rows(pictures, encoder, names=names, what="image_id", **sizes))


def test_what_is_started_is_what_is_encoded() -> None:
    backend = Encoder("Emoji-Tiny", device="cpu").backend
    assert isinstance(backend, TorchBackend)
    pixels: AnyPixels = backend.room((2, 3, 64, 64), "uint8")
    pixels[:] = torch.randint(0, 256, pixels.shape).numpy()
    np.testing.assert_array_equal(backend.start_pixels(pixels)(), backend.encode_pixels(pixels))
    token_ids = np.int64([[101, 3221, 102], [101, 102, 0]])
    np.testing.assert_array_equal(backend.start_tokens(token_ids)(), backend.encode_tokens(token_ids))
