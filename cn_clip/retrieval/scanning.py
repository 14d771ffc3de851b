"""Exact top-k by one scan in float32, of which only what may be among the best is scored in float64.

`flat` searches arrays with it, the exact engine the segments of an index. It needs numpy alone, which is quicker at it
than PyTorch: products row by row read memory in order. Over 100,000 x 512 they take 7 ms for a query, where
`vectors @ query` takes 16 and `torch.mv` 19; for 64 queries 80 ms, where one large product takes 95 to 110 (one core of
an EPYC with AVX-512, numpy 2.4.6 with OpenBLAS 0.3.31).
"""

# Q queries, N rows of all parts, B rows of a block, D dimensions, K results, P (query, row) pairs

import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.processes import usable_cores

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]

# So many numbers of rows are converted or multiplied at a time: 2 MiB as float32, which stay in a core's cache.
_CACHED = 1 << 19
# A product of fewer multiplications than this is computed by the thread that calls OpenBLAS. More are handed to its
# own threads, which for blocks as small as those of a cache cost ten times as much in waiting for each other.
_UNSHARED = 1 << 18
_MOST_SLICED = 64
_SPAN = 8192
SCORES_IN_FLIGHT = 1 << 23
_PAIRS_IN_FLIGHT = 1024
_FEW_PENDING, _MOST_PENDING = 1 << 14, 1 << 20
# Runs of rows for each row that is kept.
_RUNS = 16
# A thread is worth starting for so many numbers; memory is busy with eight of them.
_NUMBERS_PER_THREAD = 1 << 22
_MOST_THREADS = 8
_ROUNDOFF = 2.0**-24
_LOWEST = np.finfo(np.float32).min


class Matches(NamedTuple):
    """The best gallery rows of each query, best first."""

    indices: IntArray
    scores: FloatArray


class Part(Protocol):
    """Rows of a gallery that are finite, and the length of the longest."""

    @property
    def largest_norm(self) -> float:
        """Of the vectors, in float64."""
        ...

    def __len__(self) -> int: ...

    def vectors(self, start: int, stop: int) -> NDArray[np.floating]:
        """Consecutive rows (stop - start, D), float32 or float16; not to be written to."""
        ...

    def gather(self, rows_N: IntArray) -> NDArray[np.floating]:
        """Rows (N, D) in any order."""
        ...


def exact_scores(queries: NDArray[np.floating], rows_PD: NDArray[np.floating]) -> FloatArray:
    """The scores (P,) of rows with one query (D,) or with one each (P, D): sums in float64, rounded to float32.

    All engines give these, so that their answers are equal bit for bit.
    """
    scores_P: FloatArray = (rows_PD.astype(np.float64, copy=False) * queries).sum(axis=1).astype(np.float32)
    return scores_P


def norms(rows_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    """The lengths (N,) of rows, of sums in float64."""
    norms_N: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64))
    return norms_N


def largest_norm(rows_ND: NDArray[np.floating]) -> float:
    """The length of the longest row, of sums in float64; NaN or infinity if a row holds either, 0 without rows."""
    largest = 0.0
    for start in range(0, len(rows_ND), 1024):
        exact_BD = rows_ND[start : start + 1024].astype(np.float64)
        square = float(np.einsum("nd,nd->n", exact_BD, exact_BD).max())
        if not square <= largest:
            largest = square
        if not math.isfinite(square):
            break
    return math.sqrt(largest)


def margins(queries_QD: FloatArray, largest: float) -> NDArray[np.float64]:
    """Bound on |float32 score - exact score as float32| of each query with rows no longer than `largest`.

    D roundings of at most |q||g|; and where the processor flushes subnormal numbers, D flushed factors and sums.
    Raises DataError for queries so long that a product overflows float32.
    """
    length_Q = norms(queries_QD)
    bound_Q = length_Q * largest
    if bound_Q.max(initial=0.0) >= np.finfo(np.float32).max / 2:
        row = int(np.argmax(bound_Q))
        raise DataError(f"queries: row {row} is too long for float32 products; divide the vectors by their lengths")
    tiny = float(np.finfo(np.float32).tiny) * (1 + length_Q + largest)
    margin_Q: NDArray[np.float64] = 1.01 * (queries_QD.shape[1] + 4) * (_ROUNDOFF * bound_Q + tiny)
    return margin_Q


def best_rows(
    parts: Sequence[Part],
    queries_QD: FloatArray,
    k: int,
    *,
    allowed_N: Mask | None = None,
    query_block: int | None = None,
    row_block: int | None = None,
) -> Matches:
    """The k best of the allowed rows of all parts for each query, both (Q, min(k, allowed rows)).

    indices: positions in the parts one after the other. Contract as `flat.top_k`; queries_QD: finite. allowed_N: all
    by default. query_block, row_block: compare no more at a time. Raises DataError as `margins`, and what reading the
    parts raises.

    Why nothing is missed: m bounds the error of a float32 score s. If t is the K-th largest s of some rows, their
    exact scores are at least t - m, and so is the K-th best exact score of all; a row that reaches it has s >= t - 2m.
    """
    starts = [0, *itertools.accumulate(map(len, parts))]
    dense = 4 if len(queries_QD) == 1 else 2  # a row by itself takes so many times as long to read as one in a row
    spans = list(_spans(parts, starts, allowed_N, dense))
    kept = min(k, sum(span.num_rows for span in spans))
    if not kept or not len(queries_QD):
        shape = (len(queries_QD), kept)
        return Matches(np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32))
    queries_QD = np.ascontiguousarray(queries_QD)
    margin_Q = margins(queries_QD, max(span.part.largest_norm for span in spans))
    search = _Search(parts, starts, queries_QD, kept, margin_Q, query_block, row_block)
    return search.run(spans)


class _Span(NamedTuple):
    """Rows of a part from `start` to before `stop`, or `chosen_C` of it, or those that `mask_B` admits.

    first: the position of the first row of the part.
    """

    part: Part
    first: int
    start: int
    stop: int
    num_rows: int
    chosen_C: IntArray | None = None
    mask_B: Mask | None = None


def _spans(parts: Sequence[Part], starts: Sequence[int], allowed_N: Mask | None, dense: int) -> Iterator[_Span]:
    """All allowed rows; a span of which fewer than one in `dense` are allowed is read row by row."""
    is_all = allowed_N is None or bool(allowed_N.all())
    for part, first in zip(parts, starts, strict=False):
        for start in range(0, len(part), _SPAN):
            stop = min(start + _SPAN, len(part))
            size = stop - start
            if is_all or allowed_N is None:
                yield _Span(part, first, start, stop, size)
                continue
            mask_B = allowed_N[first + start : first + stop]
            count = int(np.count_nonzero(mask_B))
            if count == size:
                yield _Span(part, first, start, stop, size)
            elif count * dense >= size:
                yield _Span(part, first, start, stop, count, mask_B=mask_B)
            elif count:
                yield _Span(part, first, start, stop, count, chosen_C=start + np.flatnonzero(mask_B))


class _Search:
    """One search: what its threads share."""

    def __init__(
        self,
        parts: Sequence[Part],
        starts: Sequence[int],
        queries_QD: FloatArray,
        kept: int,
        margin_Q: NDArray[np.float64],
        query_block: int | None,
        row_block: int | None,
    ) -> None:
        self.parts, self.starts, self.queries_QD, self.kept, self.margin_Q = parts, starts, queries_QD, kept, margin_Q
        num_queries, width = len(queries_QD), max(1, queries_QD.shape[1])
        # More queries are worth the threads of one large product.
        self.is_sliced = num_queries <= min(_MOST_SLICED, _UNSHARED // (8 * width))
        cached = max(1, _CACHED // width)
        self.num_cached = min(cached, _SPAN)
        self.num_rows = min(max(cached, _SPAN // num_queries) if self.is_sliced else _SPAN, _SPAN, row_block or _SPAN)
        # Scaled rows are multiplied by scaled queries: those must not overflow, nor other threads flush such rows.
        self.may_scale = self.is_sliced and float(np.abs(queries_QD).max(initial=0.0)) < float(
            np.finfo(np.float32).max / SCALE
        )
        step = min(query_block or max(1, SCORES_IN_FLIGHT // self.num_rows), num_queries)
        self.groups = [slice(start, start + step) for start in range(0, num_queries, step)]

    def run(self, spans: Sequence[_Span]) -> Matches:
        """The best of all spans."""
        num_threads = self._num_threads(sum(span.num_rows for span in spans))
        shared, lock = iter(spans), threading.Lock()

        def following() -> Iterator[_Span]:
            while True:
                with lock:
                    span = next(shared, None)
                if span is None:
                    return
                yield span

        if num_threads == 1:
            found = [self._scan(spans)]
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                found = list(pool.map(self._scan, [following() for _ in range(num_threads)]))
        indices, scores = zip(*map(self._final, *found), strict=True)
        return Matches(np.concatenate(indices), np.concatenate(scores))

    def _num_threads(self, num_rows: int) -> int:
        if not self.is_sliced:
            return 1
        most = os.environ.get("OMP_NUM_THREADS", "")  # what numpy's products obey, too
        cores = min(usable_cores(), int(most)) if most.isdecimal() and int(most) else usable_cores()
        useful: int = num_rows * self.queries_QD.shape[1] // _NUMBERS_PER_THREAD
        return max(1, min(cores, _MOST_THREADS, useful))

    def _scan(self, spans: Sequence[_Span] | Iterator[_Span]) -> list["_Leaders"]:
        """The leaders of each group of queries among the rows of these spans."""
        leaders = [_Leaders(self, group) for group in self.groups]
        num_rows = min(self.num_rows, self.num_cached) if self.is_sliced else self.num_rows
        room_BD = np.empty((num_rows, self.queries_QD.shape[1]), dtype=np.float32)
        with np.errstate(all="ignore"):
            for span in spans:
                for positions_B, rows_BD, mask_B, is_scaled in self._blocks(span, room_BD):
                    for group in leaders:
                        scores_BQ = self._product(rows_BD, group.scaled_QD if is_scaled else group.queries_QD)
                        if mask_B is not None:
                            scores_BQ[~mask_B] = -np.inf
                        group.add(scores_BQ, positions_B)
        return leaders

    def _blocks(
        self, span: _Span, room_BD: FloatArray
    ) -> Iterator[tuple[IntArray | int, FloatArray, Mask | None, bool]]:
        """(position of the first row, or those of all; rows; which are allowed; are they scaled) of each block.

        room_BD: where float16 rows become float32.
        """
        is_half = span.part.vectors(span.start, span.start).dtype == np.float16
        is_scaled = is_half and self.may_scale and keeps_subnormals()
        step = len(room_BD) if is_half else self.num_rows
        count = span.stop - span.start if span.chosen_C is None else len(span.chosen_C)
        for offset in range(0, count, step):
            end = min(offset + step, count)
            positions: IntArray | int
            if span.chosen_C is None:
                rows_BD = span.part.vectors(span.start + offset, span.start + end)
                positions = span.first + span.start + offset
            else:
                rows_BD = span.part.gather(span.chosen_C[offset:end])
                positions = span.first + span.chosen_C[offset:end]
            if is_half:
                for start in range(0, end - offset, self.num_cached):
                    piece = slice(start, min(start + self.num_cached, end - offset))
                    (widen_scaled if is_scaled else widen)(rows_BD[piece], room_BD[piece])
                rows_BD = room_BD[: end - offset]
            yield positions, rows_BD, None if span.mask_B is None else span.mask_B[offset:end], is_scaled

    def _product(self, rows_BD: FloatArray, queries_QD: FloatArray) -> FloatArray:
        """Products (B, Q) in float32."""
        num_rows, width = rows_BD.shape
        num_queries = len(queries_QD)
        if not self.is_sliced:
            whole_BQ: FloatArray = rows_BD @ queries_QD.T
            return whole_BQ
        size = 1 if num_queries == 1 else max(1, min(32, _UNSHARED // (num_queries * max(1, width))))
        whole = num_rows // size * size
        scores_BQ = np.empty((num_rows, num_queries), dtype=np.float32)
        sliced = scores_BQ[:whole].reshape(-1, size, num_queries)
        np.matmul(rows_BD[:whole].reshape(len(sliced), size, width), queries_QD.T, out=sliced)
        if whole < num_rows:
            np.matmul(rows_BD[whole:], queries_QD.T, out=scores_BQ[whole:])
        return scores_BQ

    def _final(self, *found: "_Leaders") -> Matches:
        """The best of a group of queries, of what every thread found."""
        all_of = found[0]
        for other in found[1:]:
            all_of.pending += other.pending
            all_of.settled += other.settled
            all_of.floor_Q = np.maximum(all_of.floor_Q, other.floor_Q)
        all_of.shrink()
        return all_of.best()

    def scores_of(self, queries_QD: FloatArray, query_P: IntArray, position_P: IntArray) -> FloatArray:
        """The exact scores (P,) of pairs."""
        scores_P = np.empty(len(query_P), dtype=np.float32)
        for start in range(0, len(query_P), _PAIRS_IN_FLIGHT):
            pairs = slice(start, start + _PAIRS_IN_FLIGHT)
            rows_PD = self._gather(position_P[pairs])
            scores_P[pairs] = exact_scores(queries_QD[query_P[pairs]], rows_PD)
        return scores_P

    def _gather(self, position_P: IntArray) -> NDArray[np.floating]:
        numbers_P = np.searchsorted(self.starts, position_P, side="right") - 1
        first, last = int(numbers_P.min()), int(numbers_P.max())
        if first == last:
            return self.parts[first].gather(position_P - self.starts[first])
        rows_PD = np.empty((len(position_P), self.queries_QD.shape[1]), dtype=np.float32)
        for number in np.unique(numbers_P).tolist():
            chosen = numbers_P == number
            rows_PD[chosen] = self.parts[number].gather(position_P[chosen] - self.starts[number])
        return rows_PD


class _Leaders:
    """The pairs of a group of queries and the rows so far that may still be among the best.

    floor_Q: float32 scores below it are not. pending: (queries, positions, float32 scores); settled: as that with exact
    scores, at most K of a query.
    """

    def __init__(self, search: _Search, group: slice) -> None:
        self.search, self.kept = search, search.kept
        self.queries_QD, self.margin_Q = search.queries_QD[group], search.margin_Q[group]
        self.scaled_QD = self.queries_QD * SCALE if search.may_scale else self.queries_QD
        self.floor_Q = np.full(len(self.queries_QD), _LOWEST, dtype=np.float32)
        self.pending: list[tuple[IntArray, IntArray, FloatArray]] = []
        self.settled: list[tuple[IntArray, IntArray, FloatArray]] = []
        self.num_pending = 0
        self.crowd = 4 * self.kept * len(self.queries_QD)
        self.limit = self.crowd + _FEW_PENDING

    def add(self, scores_BQ: FloatArray, positions_B: IntArray | int) -> None:
        """Takes in the float32 scores of a block; -inf for rows that are not allowed."""
        is_above = scores_BQ >= self.floor_Q
        if np.count_nonzero(is_above) > self.crowd and len(scores_BQ) >= self.kept:
            self._raise(self._reached(scores_BQ) - 2 * self.margin_Q)
            is_above = scores_BQ >= self.floor_Q
        found = np.flatnonzero(is_above)
        if not len(found):
            return
        row_P, query_P = np.divmod(found, len(self.queries_QD))
        position_P = positions_B + row_P if isinstance(positions_B, int) else positions_B[row_P]
        self.pending.append((query_P, position_P, scores_BQ.ravel()[found]))
        self.num_pending += len(found)
        if self.num_pending > self.limit:
            self.shrink()
            if self.num_pending > _MOST_PENDING:
                self._settle()
            self.limit = max(self.limit, 2 * self.num_pending)

    def _reached(self, scores_BQ: FloatArray) -> FloatArray:
        """A score (Q,) that at least K rows of each query reach: the K-th among the best of each of many runs of rows.

        Few rows lie between it and the K-th of all, and only the best of the runs are sorted.
        """
        num_runs = min(len(scores_BQ), _RUNS * self.kept)
        length = len(scores_BQ) // num_runs
        best_RQ = scores_BQ[: num_runs * length].reshape(num_runs, length, -1).max(axis=1)
        below = num_runs - self.kept
        reached_Q: FloatArray = np.partition(best_RQ, below, axis=0)[below]
        return reached_Q

    def _raise(self, floor_Q: NDArray[np.float64]) -> None:
        """Raises the floor, rounded down; a K-th best of -inf says nothing."""
        low_Q = np.maximum(floor_Q, float(_LOWEST)).astype(np.float32)
        with np.errstate(over="ignore"):  # next below the lowest is -inf
            low_Q = np.nextafter(low_Q, np.float32(-np.inf))
        self.floor_Q = np.maximum(self.floor_Q, np.maximum(low_Q, _LOWEST))

    def shrink(self) -> None:
        """Drops pending pairs that others have outdone."""
        if not self.pending:
            return
        query_P, position_P, score_P = _joined(self.pending)
        order = np.lexsort((-score_P, query_P))
        count_Q = np.bincount(query_P, minlength=len(self.queries_QD))
        full_Q = np.flatnonzero(count_Q >= self.kept)
        kth_Q = np.full(len(self.queries_QD), -np.inf)
        kth_Q[full_Q] = score_P[order[(np.cumsum(count_Q) - count_Q)[full_Q] + self.kept - 1]]
        self._raise(kth_Q - 2 * self.margin_Q)
        is_kept = score_P >= self.floor_Q[query_P]
        self.pending = [(query_P[is_kept], position_P[is_kept], score_P[is_kept])]
        self.num_pending = int(np.count_nonzero(is_kept))

    def _settle(self) -> None:
        """Scores what is pending exactly, and keeps K of each query: with many equal vectors all of them are near."""
        ranked = self._ranked()
        count_Q = np.bincount(ranked[0], minlength=len(self.queries_QD))
        rank_P = np.arange(len(ranked[0])) - (np.cumsum(count_Q) - count_Q)[ranked[0]]
        is_best_P = rank_P < self.kept
        query_P, position_P, score_P = ranked[0][is_best_P], ranked[1][is_best_P], ranked[2][is_best_P]
        self.settled, self.pending, self.num_pending = [(query_P, position_P, score_P)], [], 0
        full_Q = np.flatnonzero(count_Q >= self.kept)
        kth_Q = np.full(len(self.queries_QD), -np.inf)
        ends_Q = np.cumsum(np.minimum(count_Q, self.kept))
        kth_Q[full_Q] = score_P[ends_Q[full_Q] - 1]
        self._raise(kth_Q - self.margin_Q)

    def _ranked(self) -> tuple[IntArray, IntArray, FloatArray]:
        """All pairs with exact scores: by query, score falling and position rising."""
        query_P, position_P, _ = _joined(self.pending)
        score_P = self.search.scores_of(self.queries_QD, query_P, position_P)
        query_P, position_P, score_P = _joined([*self.settled, (query_P, position_P, score_P)])
        order = np.lexsort((position_P, -score_P, query_P))
        return query_P[order], position_P[order], score_P[order]

    def best(self) -> Matches:
        """The K best of each query."""
        query_P, position_P, score_P = self._ranked()
        first_Q = np.searchsorted(query_P, np.arange(len(self.queries_QD)))
        chosen_QK = first_Q[:, None] + np.arange(self.kept)
        return Matches(position_P[chosen_QK], score_P[chosen_QK])


def _joined(pairs: list[tuple[IntArray, IntArray, FloatArray]]) -> tuple[IntArray, IntArray, FloatArray]:
    none = np.empty(0, dtype=np.int64)
    columns = zip((none, none, np.empty(0, dtype=np.float32)), *pairs, strict=True)
    query_P, position_P, score_P = (np.concatenate(column) for column in columns)
    return query_P, position_P, score_P


# Exponent and fraction of a float16 number, moved to where float32 has them, are the number divided by this.
SCALE = np.float32(2.0**112)
# The sign in bit 31, which is copied into three more; exponent and fraction in bits 13 to 27.
_SIGN_AND_NUMBER = np.uint32(0x8FFFE000).astype(np.int32)
_SMALLEST = np.full(1, 2.0**-149, dtype=np.float32)


def keeps_subnormals() -> bool:
    """Whether this thread computes with numbers below 2**-126, as those of float16 below 2**-14 are when scaled."""
    return bool((_SMALLEST * SCALE)[0] > 0)


def widen_scaled(half_BD: NDArray[np.floating], room_BD: FloatArray) -> None:
    """Writes finite float16 numbers, divided by `SCALE`, into `room_BD`; seven times as fast as numpy converts them."""
    bits_BD = room_BD.view(np.int32)
    np.copyto(bits_BD, half_BD.view(np.int16))
    np.left_shift(bits_BD, 13, out=bits_BD)
    np.bitwise_and(bits_BD, _SIGN_AND_NUMBER, out=bits_BD)


def widen(half_BD: NDArray[np.floating], room_BD: FloatArray) -> None:
    """Writes finite float16 numbers into `room_BD`."""
    if keeps_subnormals():
        widen_scaled(half_BD, room_BD)
        np.multiply(room_BD, SCALE, out=room_BD)
    else:
        np.copyto(room_BD, half_BD)
