"""The scan of exact search: against every score in float64 and a full sort, bit for bit and tie for tie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.retrieval import scanning
from cn_clip.retrieval.scanning import Matches, best_rows, largest_norm


@dataclass
class Rows:
    """A part in memory. read: how many rows were looked at."""

    rows_ND: NDArray[Any]
    read: int = 0

    @property
    def largest_norm(self) -> float:
        return largest_norm(self.rows_ND)

    def __len__(self) -> int:
        return len(self.rows_ND)

    def vectors(self, start: int, stop: int) -> NDArray[Any]:
        self.read += stop - start
        return self.rows_ND[start:stop]

    def gather(self, rows_N: NDArray[np.int64]) -> NDArray[Any]:
        self.read += len(rows_N)
        return self.rows_ND[rows_N]


def oracle(rows_ND: NDArray[Any], queries_QD: NDArray[Any], k: int, allowed_N: NDArray[np.bool_]) -> Matches:
    """Every allowed row scored in float64, rounded to float32, and sorted by falling score and rising row."""
    positions = np.flatnonzero(allowed_N)
    kept = min(k, len(positions))
    indices, scores = np.empty((len(queries_QD), kept), np.int64), np.empty((len(queries_QD), kept), np.float32)
    for number, query_D in enumerate(queries_QD.astype(np.float64)):
        scores_N = (query_D * rows_ND[positions].astype(np.float32)).sum(axis=1).astype(np.float32)
        best = np.lexsort((positions, -scores_N))[:kept]
        indices[number], scores[number] = positions[best], scores_N[best]
    return Matches(indices, scores)


def assert_same(found: Matches, expected: Matches) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores.view(np.int32), expected.scores.view(np.int32))
    assert (found.indices.dtype, found.scores.dtype) == (np.int64, np.float32)


SIZES = st.sampled_from([1e-42, 1e-38, 1e-30, 1e-5, 1.0, 3e4])


@st.composite
def vectors(draw: st.DrawFn, count: int, width: int, dtype: str) -> NDArray[Any]:
    """Few different numbers, so that scores tie; or any, of one size or several."""
    if draw(st.booleans()):
        small = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
        return draw(arrays(dtype, (count, width), elements=small))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    rows = generator.standard_normal((count, width)) * draw(SIZES)
    if draw(st.booleans()):
        rows *= np.array([1e-6, 1.0])[generator.integers(0, 2, (count, 1))]
    if count and draw(st.booleans()):
        rows = rows[generator.integers(0, max(1, count // 3), count)]
    if count and draw(st.booleans()):  # nearly alike
        rows = rows[:1] * (1 + 1e-7 * generator.standard_normal((count, 1)))
    return np.clip(rows, -6e4, 6e4).astype(dtype)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_the_best_rows_are_those_of_a_full_sort_in_float64(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 40), label="width")
    dtype = data.draw(st.sampled_from(["float32", "float16"]), label="dtype")
    sizes = data.draw(st.lists(st.integers(0, 60), max_size=4), label="rows of the parts")
    parts = [Rows(data.draw(vectors(size, width, dtype))) for size in sizes]
    rows_ND = np.concatenate([np.empty((0, width), dtype), *(part.rows_ND for part in parts)])
    queries_QD = data.draw(vectors(data.draw(st.sampled_from([0, 1, 2, 3, 9, 70]), label="queries"), width, "float32"))
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.6, 1.0]), label="allowed")
    allowed_N = np.random.default_rng(7).random(len(rows_ND)) < (1.0 if share is None else share)
    k = data.draw(st.integers(1, 80), label="k")
    query_block, row_block = data.draw(st.none() | st.integers(1, 9)), data.draw(st.none() | st.integers(1, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_SPAN", data.draw(st.sampled_from([1, 7, 32, 8192]), label="span"))
        patch.setattr(scanning, "_CACHED", data.draw(st.sampled_from([1, 300, 1 << 19]), label="cached"))
        patch.setattr(scanning, "_UNSHARED", data.draw(st.sampled_from([1, 300, 1 << 18]), label="unshared"))
        patch.setattr(scanning, "_MOST_PENDING", data.draw(st.sampled_from([0, 50, 1 << 20]), label="pending"))
        patch.setattr(scanning, "_FEW_PENDING", data.draw(st.sampled_from([0, 1 << 14]), label="few"))
        patch.setattr(scanning, "_NUMBERS_PER_THREAD", data.draw(st.sampled_from([1, 1 << 22]), label="per thread"))
        patch.setattr(scanning, "usable_cores", lambda: 3)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        found = best_rows(
            parts,
            queries_QD,
            k,
            allowed_N=None if share is None else allowed_N,
            query_block=query_block,
            row_block=row_block,
        )
    assert_same(found, oracle(rows_ND, queries_QD, k, allowed_N))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("num_queries", [1, 5, 64, 80])
def test_many_rows_give_the_answer_of_a_full_sort(dtype: str, num_queries: int) -> None:
    generator = np.random.default_rng(0)
    rows_ND = generator.standard_normal((20_000, 96)).astype(np.float32)
    rows_ND = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(dtype)
    rows_ND[15_000:] = rows_ND[:5_000]
    queries_QD = generator.standard_normal((num_queries, 96)).astype(np.float32)
    parts = [Rows(rows_ND[:9_000]), Rows(rows_ND[9_000:9_003]), Rows(rows_ND[9_003:])]
    for allowed_N in (np.ones(20_000, bool), np.arange(20_000) % 9 == 0, np.arange(20_000) % 3 > 0):
        found = best_rows(parts, queries_QD, 30, allowed_N=allowed_N)
        assert_same(found, oracle(rows_ND, queries_QD, 30, allowed_N))


def test_rows_that_get_nearer_and_nearer_are_found_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_CACHED", 256 * 8)
    monkeypatch.setattr(scanning, "_MOST_PENDING", 1000)
    most = []
    shrink = scanning._Leaders.shrink
    monkeypatch.setattr(scanning._Leaders, "shrink", lambda self: (most.append(self.num_pending), shrink(self))[1])
    rows_ND = np.linspace(0, 1, 50_000, dtype=np.float32)[:, None] * np.ones((1, 8), np.float32)
    queries_QD = np.ones((3, 8), np.float32)
    assert_same(best_rows([Rows(rows_ND)], queries_QD, 9), oracle(rows_ND, queries_QD, 9, np.ones(50_000, bool)))
    same_ND = np.ones((50_000, 8), np.float32)
    assert best_rows([Rows(same_ND)], queries_QD, 9).indices.tolist() == [list(range(9))] * 3
    assert max(most) < 60_000


def test_few_allowed_rows_are_read_alone() -> None:
    rows = Rows(np.random.default_rng(1).standard_normal((30_000, 8)).astype(np.float32))
    allowed_N = np.zeros(30_000, bool)
    allowed_N[[5, 20_000, 20_001]] = True
    found = best_rows([rows], np.ones((1, 8), np.float32), 10, allowed_N=allowed_N)
    assert sorted(found.indices[0].tolist()) == [5, 20_000, 20_001]
    assert rows.read == 6  # once in float32, once in float64
    assert best_rows([rows], np.ones((2, 8), np.float32), 10, allowed_N=np.zeros(30_000, bool)).indices.shape == (2, 0)


@pytest.mark.parametrize("is_flushing", [False, True])
def test_every_finite_float16_becomes_its_float32(is_flushing: bool) -> None:
    """Also where the processor flushes subnormal numbers, as `torch.set_flush_denormal` makes it."""
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)].reshape(8, -1)
    expected, found = half.astype(np.float32), np.empty(half.shape, np.float32)
    torch.set_flush_denormal(is_flushing)
    try:
        assert scanning.keeps_subnormals() is not is_flushing
        scanning.widen(half, found)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def test_subnormal_float16_numbers_count_where_the_processor_flushes_those_of_float32() -> None:
    generator = np.random.default_rng(2)
    rows_ND = (generator.standard_normal((500, 16)) * 1e-6).astype(np.float16)
    queries_QD = (generator.standard_normal((2, 16)) * 1e20).astype(np.float32)
    expected = oracle(rows_ND, queries_QD, 10, np.ones(500, bool))
    torch.set_flush_denormal(True)
    try:
        found = best_rows([Rows(rows_ND)], queries_QD, 10)
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


def test_what_reading_a_part_raises_comes_through_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(Rows):
        def vectors(self, start: int, stop: int) -> NDArray[Any]:
            if stop > 9000:
                raise DataError("block 3 is damaged")
            return super().vectors(start, stop)

    monkeypatch.setattr(scanning, "_NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr(scanning, "usable_cores", lambda: 4)
    with pytest.raises(DataError, match="block 3 is damaged"):
        best_rows([Damaged(np.ones((20_000, 4), np.float32))], np.ones((1, 4), np.float32), 3)
