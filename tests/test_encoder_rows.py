"""The rows of an `Encoder`: their types, tensors, and what is asked of them: similarity, classes, the nearest."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_encoder import FixedBackend, model  # noqa: F401  (the fixture)

from cn_clip.clip import Encoder, scoring
from cn_clip.clip.model import CLIP
from cn_clip.clip.row_types import of_type
from cn_clip.clip.templates import load_templates
from cn_clip.errors import ConfigError, DataError, NotFiniteError

TEXTS = ["皮卡丘", "一只狗", "小火龙" * 9, "妙蛙种子"]


@pytest.fixture(scope="module")
def encoder(model: CLIP) -> Encoder:  # noqa: F811
    return Encoder(model, device="cpu")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)) for _ in range(count)]


def encode(encoder: Encoder, kind: str, **how: Any) -> Any:
    return encoder.encode_texts(TEXTS, **how) if kind == "texts" else encoder.encode_images(pictures(4), **how)


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_tensors_and_arrays_hold_the_same_rows(encoder: Encoder, kind: str, dtype: str, batch_size: int) -> None:
    array = encode(encoder, kind, dtype=dtype, batch_size=batch_size)
    tensor = encode(encoder, kind, dtype=dtype, batch_size=batch_size, output="torch")
    assert array.dtype == dtype
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert (tensor.device.type, tensor.shape) == ("cpu", (4, 24))
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_narrow_rows_point_where_the_wide_ones_do(encoder: Encoder, kind: str) -> None:
    rows = encode(encoder, kind)
    for dtype, least in (("float16", 0.999999), ("int8", 0.9999)):
        cosines = encoder.similarity(rows, encode(encoder, kind, dtype=dtype))
        assert np.diag(cosines).min() > least


def test_rows_in_int8_are_those_worked_out_by_hand() -> None:
    rows = np.float32([[0.6, -0.8], [1, 0]])
    assert of_type(rows, "int8").tolist() == [[95, -127], [127, 0]]  # 0.6 * 127 / 0.8 = 95.25
    assert of_type(torch.from_numpy(rows), "int8").tolist() == [[95, -127], [127, 0]]
    assert of_type(rows[:0], "int8").shape == (0, 2)


def test_tensors_are_ordinary_ones_that_a_probe_can_be_trained_on(encoder: Encoder) -> None:
    rows = encoder.encode_texts(TEXTS, output="torch")
    assert not rows.requires_grad
    probe = torch.nn.Linear(24, 2)
    probe(rows).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("dtype", [np.float16, "float16", torch.float16, np.dtype("float16")])
def test_types_may_be_named_as_numpy_and_torch_name_them(encoder: Encoder, dtype: Any) -> None:
    assert encoder.encode_texts("狗", dtype=dtype).dtype == np.float16


def test_nothing_gives_no_rows_of_the_kind_asked_for(encoder: Encoder) -> None:
    for rows in (encoder.encode_texts([], dtype="int8"), encoder.encode_images([], dtype="int8")):
        assert (rows.shape, rows.dtype) == ((0, 24), np.int8)
    for tensor in (encoder.encode_texts([], output="torch"), encoder.encode_images(iter([]), output="torch")):
        assert (tuple(tensor.shape), tensor.dtype) == ((0, 24), torch.float32)


def test_other_outputs_and_types_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match=r"output: expected one of \['numpy', 'torch'\], got 'jax'"):
        encoder.encode_texts(["狗"], output="jax")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"dtype: expected one of .* got 'float_16'; did you mean 'float16'"):
        encoder.encode_images([], dtype="float_16")
    for dtype in ("float64", np.float64, int, None, "uint8"):
        with pytest.raises(ConfigError, match="dtype: expected one of"):
            encoder.encode_texts(["狗"], dtype=dtype)


def test_a_backend_without_tensors_gives_them_on_the_cpu() -> None:
    rows = Encoder(FixedBackend()).encode_texts(["狗", "小火龙"], output="torch")
    assert rows.tolist() == [[0, 1, 0]] * 2


def test_a_row_that_is_not_finite_is_named_for_tensors_too(model: CLIP) -> None:  # noqa: F811
    import copy

    broken = copy.deepcopy(model)
    broken.visual.proj.data[:] = np.nan
    with pytest.raises(NotFiniteError, match=r"^picture 0: the model gives NaN or infinity"):
        Encoder(broken, device="cpu").encode_images(pictures(3), output="torch", batch_size=2)


# --- similarity


def test_similarity_is_the_cosine_worked_out_by_hand(encoder: Encoder) -> None:
    first, second = [[3.0, 4.0], [0.0, 2.0]], np.array([[4, 3], [-1, 0]], np.int8)
    expected = [[0.96, -0.6], [0.6, 0.0]]  # (3·4 + 4·3) / (5 · 5), (-3) / 5, 6 / (2 · 5), 0
    assert encoder.similarity(first, second).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    tensor = encoder.similarity(torch.tensor(first), second)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)
    assert encoder.similarity(first[0], second).shape == (1, 2)  # type: ignore[call-overload]


def test_similarity_of_unit_rows_is_their_product(encoder: Encoder) -> None:
    rows = encoder.encode_texts(TEXTS)
    np.testing.assert_array_equal(encoder.similarity(rows, rows), rows @ rows.T)


@pytest.mark.parametrize("of", [np.array, torch.tensor], ids=["array", "tensor"])
def test_rows_that_have_no_cosine_are_refused(encoder: Encoder, of: Any) -> None:
    good = of([[1.0, 0.0]])
    for wrong, words in (
        ([[1.0, 0.0], [0.0, 0.0]], "second: row 1 holds zeros only, which have no direction"),
        ([[float("nan"), 0.0]], "second: row 0 holds NaN or infinity"),
        ([[1.0, 0.0, 0.0]], "second: rows of 3 dimensions, but the first have 2"),
        ([[[1.0, 0.0]]], r"second: expected rows of numbers \(N, D\)"),
    ):
        with pytest.raises(DataError, match=words):
            encoder.similarity(good, of(wrong))
    with pytest.raises(DataError, match="first: expected rows of numbers"):
        encoder.similarity(["猫", "狗"], ["猫"])  # type: ignore[list-item]


# --- the nearest


def test_the_nearest_are_those_worked_out_by_hand(encoder: Encoder) -> None:
    gallery = np.array([[1, 0], [0, 1], [3, 4], [1, 0]], dtype=np.float32)
    found = encoder.top_k([[2.0, 0.0]], gallery, 3)
    assert found.indices.tolist() == [[0, 3, 2]]  # equal ones in the order of the gallery
    np.testing.assert_allclose(found.scores, [[1, 1, 0.6]], atol=1e-6)
    assert encoder.top_k(torch.tensor([[0.0, 1.0]]), gallery.astype(np.float16), 9).indices.tolist() == [[1, 2, 0, 3]]
    assert encoder.top_k(gallery[:0], gallery).indices.shape == (0, 4)
    for k in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="k: expected"):
            encoder.top_k(gallery, gallery, k)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="dimensions"):
        encoder.top_k([[1.0, 0.0, 0.0]], gallery)


def test_a_text_finds_itself_in_int8_too(encoder: Encoder) -> None:
    rows = encoder.encode_texts(TEXTS)
    assert encoder.top_k(rows, encoder.encode_texts(TEXTS, dtype="int8"), 1).indices[:, 0].tolist() == [0, 1, 2, 3]


# --- classes


def test_classes_are_those_of_the_zero_shot_command(encoder: Encoder) -> None:
    labels, images = ["猫", "狗", "小火龙"], pictures(5)
    found = encoder.classify(images, labels)
    classes = scoring.classifier(encoder, labels, load_templates("default"), progress=False)
    expected = scoring.probabilities(encoder.encode_images(images), classes, scale=encoder.facts.logit_scale or 100)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.labels == [labels[number] for number in expected.argmax(axis=1)]
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)


def test_templates_may_be_ones_own(encoder: Encoder) -> None:
    rows = encoder.class_rows(["猫", "狗"], "{}")
    np.testing.assert_allclose(rows, encoder.encode_texts(["猫", "狗"]), atol=1e-6)
    both = encoder.class_rows(["猫"], ["{}", "一张{}的照片"])
    expected = encoder.encode_texts(["猫", "一张猫的照片"]).mean(axis=0)
    np.testing.assert_allclose(both[0], expected / np.linalg.norm(expected), atol=1e-5)
    assert encoder.classify([], ["猫", "狗"]).probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    ("labels", "templates", "words"),
    [
        ("猫", None, "labels: expected a list of labels, got '猫'"),
        ([], None, "labels: expected at least one, got none"),
        (["猫", ""], None, r"labels\[1\]: expected a word or a phrase, got ''"),
        (["猫", 3], None, r"labels\[1\]: expected a word or a phrase, got 3"),
        (["猫", "狗", "猫"], None, "labels: '猫' is there twice"),
        (["猫"], [], "templates: expected at least one"),
        (["猫"], "一张照片", r"templates\[0\]: expected exactly one {} for the label"),
        (["猫"], ["{}", 3], r"templates\[1\]: expected a string, got int"),
    ],
)
def test_labels_and_templates_that_cannot_be_are_refused(
    encoder: Encoder, labels: Any, templates: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        encoder.classify(pictures(1), labels, templates=templates)
