"""`Encoder`: unit rows in the order given, whatever the batches, the kind of input and the backend."""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CONFIGS, TEXT, tiny_model

from cn_clip import progress, ranks, zoo
from cn_clip.clip import Encoder, tokenize
from cn_clip.clip.backends.base import Facts, Parts, Pixels, Rows, TokenIds
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.model import CLIP
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.clip.transforms import ImageTransform
from cn_clip.errors import ConfigError, DataError, NotFiniteError

TEXTS = ["皮卡丘", "一只黑白相间的狗在雪地里奔跑，嘴里叼着一个红色的飞盘", "", "a", "小火龙" * 40, "妙蛙种子 和 杰尼龟"]


@pytest.fixture(scope="module")
def model() -> CLIP:
    """Tiny towers, but with the real vocabulary."""
    from dataclasses import replace

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return CLIP.from_config(
            replace(CONFIGS["vit"], text=replace(TEXT, vocab_size=21128, text_initializer_range=0.3))
        ).eval()


@pytest.fixture(scope="module")
def encoder(model: CLIP) -> Encoder:
    return Encoder(model, device="cpu")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in rng.integers(8, 70, (count, 2))]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def unit(features: torch.Tensor) -> np.ndarray[Any, Any]:
    rows: np.ndarray[Any, Any] = torch.nn.functional.normalize(features).numpy()
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_text_rows_are_the_models_own_features_in_the_order_given(
    encoder: Encoder, model: CLIP, batch_size: int
) -> None:
    rows = encoder.encode_texts(TEXTS, batch_size=batch_size)
    with torch.inference_mode():
        expected = unit(model.encode_text(tokenize(TEXTS)))
    assert rows.shape == (6, 24)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    # Padding to the batch instead of to 52 changes the order of sums, nothing else.
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert np.abs(expected[:, None] - expected[None]).max(axis=-1)[~np.eye(6, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_picture_rows_are_the_models_own_features_in_the_order_given(
    encoder: Encoder, model: CLIP, batch_size: int
) -> None:
    images = pictures(5)
    rows = encoder.encode_images(images, batch_size=batch_size)
    with torch.inference_mode():
        expected = unit(model.encode_image(torch.stack([encoder.transform(image) for image in images])))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@given(lengths=st.lists(st.integers(0, 60), max_size=20), batch_size=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_lengths_keeps_its_order(encoder: Encoder, lengths: list[int], batch_size: int) -> None:
    texts = ["狗" * length for length in lengths]
    rows = encoder.encode_texts(texts, batch_size=batch_size)
    single = {length: encoder.encode_texts("狗" * length)[0] for length in set(lengths)}
    assert rows.shape == (len(lengths), 24)
    for row, length in zip(rows, lengths, strict=True):
        np.testing.assert_allclose(row, single[length], atol=1e-5)


def test_pieces_of_a_long_list_join_to_the_same_rows(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoder.encode_texts(TEXTS)
    monkeypatch.setattr("cn_clip.clip.encoder.SORTING_WINDOW", 4)
    done: list[int] = []
    pieces = list(encoder.encode_text_windows(TEXTS, batch_size=3, advance=done.append))
    assert [len(piece) for piece in pieces] == [4, 2]
    assert done == [3, 1, 2]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


def test_a_short_context_cuts_texts(model: CLIP) -> None:
    rows = Encoder(model, device="cpu", context_length=5).encode_texts(["小火龙杰尼龟", "小火龙"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


def test_nothing_in_nothing_out(encoder: Encoder) -> None:
    for rows in (encoder.encode_texts([]), encoder.encode_images([])):
        assert rows.shape == (0, 24)
        assert rows.dtype == np.float32


def test_a_single_text_or_picture_is_a_list_of_one(encoder: Encoder, tmp_path: Path) -> None:
    image = pictures(1)[0]
    image.save(tmp_path / "a.png")
    rows = [encoder.encode_images(one) for one in (image, png(image), tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert [row.shape for row in rows] == [(1, 24)] * 4
    assert encoder.encode_texts("皮卡丘").shape == (1, 24)


def test_paths_bytes_and_pil_pictures_give_equal_rows(encoder: Encoder, tmp_path: Path) -> None:
    image = pictures(1)[0]
    (tmp_path / "图片.png").write_bytes(png(image))
    rows = encoder.encode_images([image, png(image), tmp_path / "图片.png", str(tmp_path / "图片.png")])
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 4, axis=0), atol=1e-6)


def test_inputs_may_come_from_a_generator(encoder: Encoder) -> None:
    images = pictures(3)
    np.testing.assert_array_equal(encoder.encode_images(image for image in images), encoder.encode_images(images))
    np.testing.assert_array_equal(encoder.encode_texts(text for text in TEXTS), encoder.encode_texts(TEXTS))


@pytest.mark.filterwarnings("error")
def test_animations_give_their_first_frame_and_leave_no_file_open(encoder: Encoder, tmp_path: Path) -> None:
    first, second = (image.resize((20, 20)).quantize(8) for image in pictures(2))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        rows = encoder.encode_images([tmp_path / "a.gif"])
    with Image.open(tmp_path / "a.gif") as image:
        np.testing.assert_array_equal(rows, encoder.encode_images([image]))


def test_one_lazily_opened_picture_may_be_given_many_times(encoder: Encoder) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8))
    data = png(image)
    for _ in range(3):
        with Image.open(io.BytesIO(data)) as lazily_opened:
            rows = encoder.encode_images([lazily_opened] * 8, num_threads=4)
        np.testing.assert_allclose(rows, np.repeat(encoder.encode_images([data]), 8, axis=0), atol=1e-6)


@pytest.mark.parametrize("name", ["missing.jpg", "text.jpg", "empty.png", "cut.png", "folder"])
def test_a_picture_that_cannot_be_read_is_named(encoder: Encoder, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.jpg").write_text("这不是图片")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(png(pictures(1)[0])[:-400])
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        encoder.encode_images([*pictures(2), tmp_path / name], batch_size=2)
    reason = "no such file" if name == "missing.jpg" else "not a picture that can be decoded ("
    assert str(caught.value).startswith(f"{tmp_path / name}: {reason}")


def test_bytes_and_open_pictures_that_cannot_be_read_are_named_by_their_place(encoder: Encoder, tmp_path: Path) -> None:
    cut = png(pictures(1)[0])[:-400]
    with pytest.raises(DataError, match=r"^picture 3: not a picture that can be decoded"):
        encoder.encode_images([*pictures(3), b"GIF89a"], batch_size=2)
    with (
        Image.open(io.BytesIO(cut)) as lazily_opened,
        pytest.raises(DataError, match=r"^picture 2: not a picture that can be decoded"),
    ):
        encoder.encode_images([*pictures(2), lazily_opened], batch_size=2)


def test_other_kinds_of_objects_are_a_type_error(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match=r"picture 1: expected a path, encoded bytes, an open file, .* got int"):
        encoder.encode_images([*pictures(1), 3])  # type: ignore[list-item]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(encoder: Encoder, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size: expected at least 1, got {batch_size}"):
        encoder.encode_texts(TEXTS, batch_size=batch_size)
    with pytest.raises(ConfigError, match=f"batch_size: expected at least 1, got {batch_size}"):
        encoder.encode_images(pictures(1), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [2.5, "4", True])
def test_a_batch_size_that_is_no_whole_number_is_refused(encoder: Encoder, batch_size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got "):
        encoder.encode_texts(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize("num_threads", [-1, 1.5, "2"])
def test_decoding_threads_that_cannot_be_are_refused(encoder: Encoder, num_threads: Any) -> None:
    with pytest.raises(ConfigError, match="num_threads: expected a whole number of at least 0, got "):
        encoder.encode_images(pictures(1), num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [0, 1.5])
def test_computing_threads_that_cannot_be_are_refused(num_threads: Any) -> None:
    with pytest.raises(ConfigError, match="num_threads: expected a whole number of at least 1, got "):
        Encoder(tiny_model(), num_threads=num_threads)


def test_a_device_that_does_not_exist_is_refused_for_a_model_too() -> None:
    with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"):
        Encoder(tiny_model(), device="gpu")
    assert Encoder(tiny_model(), device="auto").embed_dim == 24


def test_progress_is_shown_only_when_asked_and_counts_all(
    encoder: Encoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int | None, bool, progress.Step]] = []
    shown = progress.progress

    @contextlib.contextmanager
    def record(total: int | None, unit: str, label: str, *, when: bool) -> Iterator[progress.Step]:
        with shown(total, unit, label, when=when) as step:
            steps.append((total, when, step))
            yield step

    monkeypatch.setattr(progress, "progress", record)
    for is_asked in (False, True):
        encoder.encode_texts(TEXTS, progress=is_asked)
        encoder.encode_images(iter(pictures(2)), progress=is_asked)
    assert [(total, when, step.num_done) for total, when, step in steps] == [
        *((6, False, 6), (None, False, 2)),
        *((6, True, 6), (None, True, 2)),
    ]
    assert capsys.readouterr() == ("", "")  # no terminal


class FixedBackend:
    """Counts what it is given: any object with these attributes is a backend."""

    resolution = 16
    embed_dim = 3

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        self.shapes.append(tuple(pixels_B3RR.shape))
        return np.tile(np.float32([1, 0, 0]), (len(pixels_B3RR), 1))

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        self.shapes.append(tuple(token_ids_BL.shape))
        return np.tile(np.float32([0, 1, 0]), (len(token_ids_BL), 1))


def test_any_object_with_the_two_methods_is_a_backend() -> None:
    backend = FixedBackend()
    encoder = Encoder(backend)
    assert encoder.embed_dim == 3
    np.testing.assert_array_equal(encoder.encode_images(pictures(3), batch_size=2), [[1, 0, 0]] * 3)
    np.testing.assert_array_equal(encoder.encode_texts(["狗", "小火龙", "皮卡"], batch_size=2), [[0, 1, 0]] * 3)
    # Texts are sorted by length and padded to the longest of their batch: [CLS] + 2 + [SEP], then 3.
    assert backend.shapes == [(2, 3, 16, 16), (1, 3, 16, 16), (2, 4), (1, 5)]


class SmallBackend(FixedBackend):
    """Has memory for so many inputs at once."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error = most, error

    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        if len(pixels_B3RR) > self.most:
            raise self.error
        rows = super().encode_pixels(pixels_B3RR)
        if (pixels_B3RR > 1e6).any():
            raise NotFiniteError("row", [int(np.argmax((pixels_B3RR > 1e6).any(axis=(1, 2, 3))))])
        return rows


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_batch_that_memory_has_no_room_for_is_halved_and_that_is_told_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    backend = SmallBackend(3, error)
    encoder = Encoder(backend)
    np.testing.assert_array_equal(encoder.encode_images(pictures(24), batch_size=12), [[1, 0, 0]] * 24)
    assert [shape[0] for shape in backend.shapes] == [3] * 8
    assert encoder.most_at_once == {"image": 3}
    assert [record.message for record in caplog.records] == ["out of memory with 12 images at once; going on with 3"]


def test_an_input_that_memory_has_no_room_for_is_an_error_as_any_other() -> None:
    with pytest.raises(MemoryError, match="none"):
        Encoder(SmallBackend(0, MemoryError("none"))).encode_images(pictures(4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Encoder(SmallBackend(1, RuntimeError("size mismatch"))).encode_images(pictures(4))


def test_positions_in_a_batch_that_was_halved_are_those_of_the_batch() -> None:
    pixels = np.zeros((8, 3, 16, 16), dtype=np.float32)
    pixels[6] = 1e7
    with pytest.raises(NotFiniteError) as caught:
        Encoder(SmallBackend(2, MemoryError())).start_pixels(pixels)()
    assert caught.value.positions == [6]


def test_the_backend_knows_its_usual_batch_sizes() -> None:
    backend = FixedBackend()
    backend.facts = Facts(batch_sizes=(2, 3))  # type: ignore[attr-defined]
    encoder = Encoder(backend)
    encoder.encode_images(pictures(3))
    encoder.encode_texts(["狗"] * 4)
    assert [shape[0] for shape in backend.shapes] == [2, 1, 3, 1]


SETTINGS: list[dict[str, Any]] = [
    {"precision": "bf16"},
    {"backend": "onnx"},
    {"num_threads": 2},
    {"device": "cpu"},
    {"compile": True},
    {"download_root": "x"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: next(iter(one)))
def test_settings_for_a_model_that_is_open_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}: the model is a backend, opened with its own settings"):
        Encoder(FixedBackend(), **setting)
    parts = Parts(FixedBackend(), ImageTransform(4), ChineseTexts(52))
    for one in (setting, {"decode": "reference"}):
        with pytest.raises(ConfigError, match=f"{next(iter(one))}: the model is parts, opened with its own settings"):
            Encoder(parts, **one)


def test_a_length_that_parts_do_not_cut_at_is_refused_though_it_is_the_usual_one() -> None:
    parts = Parts(FixedBackend(), ImageTransform(4), ChineseTexts(64))
    assert Encoder(parts).context_length == Encoder(parts, context_length=64).context_length == 64
    with pytest.raises(ConfigError, match="context_length 52: this model cuts texts at 64 tokens of its own"):
        Encoder(parts, context_length=52)


@pytest.mark.parametrize("of", [lambda: "Emoji-Tiny", tiny_model], ids=["name", "model"])
def test_the_device_is_chosen_as_the_commands_choose_theirs(
    of: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, choose = [], ranks.choose_device

    def record(device: Any = "auto") -> torch.device:
        asked.append(device)
        return choose("cpu")

    monkeypatch.setattr(ranks, "choose_device", record)
    Encoder(of())
    assert set(asked) - {torch.device("cpu")} == {"auto"}  # CUDA, else MPS, else the CPU


def test_a_folder_for_downloads_is_refused_beside_a_loaded_model() -> None:
    with pytest.raises(ConfigError, match="download_root: the model is a CLIP"):
        Encoder(tiny_model(), download_root="x")


def test_an_encoder_opens_files_by_path(tmp_path: Path, model: CLIP, encoder: Encoder) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for path in (tmp_path / "model.pt", str(tmp_path / "model.pt")):
        np.testing.assert_array_equal(Encoder(path, device="cpu").encode_texts(TEXTS), encoder.encode_texts(TEXTS))


def test_lower_precisions_stay_close_and_return_float32() -> None:
    exact = Encoder(tiny_model(), device="cpu").encode_images(pictures(2))
    rows = Encoder(tiny_model(), device="cpu", precision="bf16").encode_images(pictures(2))
    assert rows.dtype == np.float32
    assert 0 < np.abs(rows - exact).max() < 0.05


def test_full_precision_is_full_precision_for_a_model_in_half_precision() -> None:
    backend = TorchBackend(tiny_model().half(), precision="fp32")
    assert {parameter.dtype for parameter in backend.model.parameters()} == {torch.float32}


def test_a_text_or_picture_without_a_vector_is_named(model: CLIP, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    broken.bert.embeddings.word_embeddings.weight.data[tokenize(["坏"])[0, 1]] = np.nan
    encoder = Encoder(broken, device="cpu")
    texts = ["皮卡丘"] * 3 + ["坏人", "很坏的人，" * 20, "好"]
    with pytest.raises(
        NotFiniteError, match=r"^text 3 \('坏人'\): the model gives NaN or infinity; compute in fp32"
    ) as one:
        encoder.encode_texts(texts, batch_size=6)
    assert one.value.positions == [3, 4]
    with pytest.raises(NotFiniteError, match=r"^text 4 \('很坏的人，很坏"):
        encoder.encode_texts([texts[index] for index in (0, 1, 2, 5, 4)], batch_size=2)
    assert encoder.encode_texts(["好"]).shape == (1, 24)
    broken.visual.proj.data[:] = np.inf
    pictures(1)[0].save(tmp_path / "a.png")
    with pytest.raises(NotFiniteError, match=r"a\.png: the model gives NaN or infinity"):
        encoder.encode_images([tmp_path / "a.png"])
    with pytest.raises(NotFiniteError, match=r"^picture 0: the model gives NaN or infinity"):
        encoder.encode_images(pictures(3), batch_size=2)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="precision: the torch backend computes in fp32 or bf16 or fp16 or auto, got 'int8'"
    ):
        Encoder(tiny_model(), device="cpu", precision="int8")


def test_the_small_named_models_make_rows_of_their_width() -> None:
    with torch.random.fork_rng(devices=[]):
        small = CLIP.from_config(zoo.model_config("RN-Tiny-64", "BERT-Tiny-chinese")).eval()
    encoder = Encoder(small, device="cpu")
    assert encoder.encode_images(pictures(2)).shape == (2, encoder.embed_dim)
