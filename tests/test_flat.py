"""Exact top-k: worked by hand, against a full sort in float64, and on hostile input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval.flat import Matches, top_k


def sorted_scores(queries: np.ndarray, gallery: np.ndarray, k: int) -> Matches:
    """The contract of top_k, spelled as a full stable sort."""
    scores = (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Matches(order, np.take_along_axis(scores, order, axis=1))


def unit_rows(generator: np.random.Generator, rows: int, dimensions: int) -> np.ndarray:
    vectors = generator.standard_normal((rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_equal_scores_keep_gallery_order() -> None:
    gallery = np.array([[1, 0], [2, 0], [0, 1], [2, 5], [1, 9]], dtype=np.float32)
    found = top_k(np.array([[1, 0], [0, -1]], dtype=np.float32), gallery, 4)
    assert found.indices.tolist() == [[1, 3, 0, 4], [0, 1, 2, 3]]
    assert found.scores.tolist() == [[2, 2, 1, 1], [0, 0, -1, -5]]
    assert found.indices.dtype == np.int64
    assert found.scores.dtype == np.float32


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_top_k_equals_a_stable_sort_when_most_scores_are_tied(device: torch.device, data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, 4))
    small = st.integers(-2, 2).map(float)
    queries = data.draw(arrays(np.float32, (data.draw(st.integers(0, 6)), dimensions), elements=small))
    gallery = data.draw(arrays(np.float32, (data.draw(st.integers(0, 25)), dimensions), elements=small))
    k = data.draw(st.integers(1, 30))
    blocks = {"query_block": data.draw(st.integers(1, 7)), "gallery_block": data.draw(st.integers(1, 30))}
    found, expected = top_k(queries, gallery, k, **blocks, device=device), sorted_scores(queries, gallery, k)
    assert found.indices.shape == (len(queries), min(k, len(gallery)))
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize(("query_block", "gallery_block"), [(None, 32768), (1, 7), (5, 100), (64, 333), (3, 1000)])
def test_blocks_do_not_change_the_answer_on_nearly_equal_vectors(
    query_block: int | None, gallery_block: int, device: torch.device
) -> None:
    generator = np.random.default_rng(5)
    gallery = unit_rows(generator, 1, 32) + generator.normal(scale=1e-6, size=(1000, 32)).astype(np.float32)
    gallery[500:600] = gallery[:100]
    queries = unit_rows(generator, 17, 32)
    found = top_k(queries, gallery, 25, query_block=query_block, gallery_block=gallery_block, device=device)
    expected = sorted_scores(queries, gallery, 25)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_more_results_than_rows_gives_every_row() -> None:
    generator = np.random.default_rng(1)
    queries, gallery = unit_rows(generator, 3, 8), unit_rows(generator, 5, 8)
    found = top_k(queries, gallery, 1000)
    assert np.sort(found.indices, axis=1).tolist() == [[0, 1, 2, 3, 4]] * 3
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_a_gallery_of_one_repeated_vector_gives_its_first_rows() -> None:
    gallery = np.repeat(unit_rows(np.random.default_rng(2), 1, 16), 5000, axis=0)
    found = top_k(gallery[:2], gallery, 3, gallery_block=700)
    assert found.indices.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_autocast_and_lowered_precision_of_the_caller_do_not_change_the_answer(device: torch.device) -> None:
    generator = np.random.default_rng(3)
    queries, gallery = unit_rows(generator, 10, 64), unit_rows(generator, 2000, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = top_k(queries, gallery, 10, device=device)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found.indices, sorted_scores(queries, gallery, 10).indices)


def test_the_inputs_are_left_as_they_were() -> None:
    generator = np.random.default_rng(4)
    queries, gallery = unit_rows(generator, 4, 8), unit_rows(generator, 9, 8)
    copies = queries.copy(), gallery.copy()
    top_k(queries, gallery, 3, query_block=2, gallery_block=4)
    np.testing.assert_array_equal(queries, copies[0])
    np.testing.assert_array_equal(gallery, copies[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["queries", "gallery"])
def test_a_row_that_is_not_finite_is_named(name: str, value: float) -> None:
    both = {"queries": np.zeros((4, 3), dtype=np.float32), "gallery": np.zeros((5, 3), dtype=np.float32)}
    both[name][2, 1] = value
    with pytest.raises(DataError, match=f"{name}: row 2 "):
        top_k(both["queries"], both["gallery"], 1)


def test_rows_whose_products_overflow_are_refused() -> None:
    huge = np.full((2, 4), 1e30, dtype=np.float32)
    with pytest.raises(DataError, match="row 0 is too long"):
        top_k(huge, huge, 1)


def test_wrong_shapes_types_and_settings_are_refused() -> None:
    good = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(DataError, match="2 dimensions"):
        top_k(good[0], good, 1)
    with pytest.raises(DataError, match="float64"):
        top_k(good, good.astype(np.float64), 1)
    with pytest.raises(DataError, match="queries have 3 dimensions, the gallery has 2"):
        top_k(good, good[:, :2], 1)
    for settings_ in ({"k": 0}, {"k": 1, "query_block": 0}, {"k": 1, "gallery_block": -1}):
        with pytest.raises(ConfigError, match="at least 1"):
            top_k(good, good, **settings_)


def test_vectors_of_no_numbers_tie() -> None:
    found = top_k(np.zeros((2, 0), np.float32), np.zeros((3, 0), np.float32), 2)
    assert found.indices.tolist() == [[0, 1], [0, 1]]
    assert found.scores.tolist() == [[0, 0], [0, 0]]
