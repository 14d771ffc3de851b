"""Exact search that reads a quarter of the bytes or less: codes of one byte a number rule out all rows but a few.

For each query every row has a bound that its score cannot exceed, see `codes`. The rows of the largest bounds are
scored exactly first; the k-th of these scores then rules out every row of a smaller bound, and what is left is scored
exactly, too. So the k best are proven, with the scores and the order of the exact engine, whatever the vectors are. A
query that leaves too many rows is answered by the exact engine.
"""

# Q queries, N rows, B blocks of rows, C columns of a plane, P rows that are left, K results

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import extras
from cn_clip.errors import DataError
from cn_clip.retrieval.codes import BLOCK, NAME, Asked, CodeArray, Codes, DoubleArray, PlaneQuery
from cn_clip.retrieval.engines import ExactEngine, Found, Mask, Rows
from cn_clip.retrieval.scanning import exact_scores, norms
from cn_clip.retrieval.segments import FloatArray, IntArray, warn_without

logger = logging.getLogger(__name__)

ProductArray = NDArray[np.int32]

# Queries that share a reading of the codes, and products of codes that are kept at a time.
_QUERIES = 64
_PRODUCTS = 1 << 23
# Rows whose products stay in the cache of a core.
_ROWS = 16384
# Up to so many columns the kernel for several rows is faster than that for one (numkong 7.8, one query).
_WIDEST = 320
# A query that leaves more rows than these, or than a sixteenth, is answered by the exact engine.
_MOST_LEFT = 4096
_MOST_SHARE = 1 / 16
# Where the heads leave more than this share of the rows, the tails are read in one go.
_MOST_GATHERED = 1 / 8
_LARGEST_PRODUCT = 1e37
# Rows with the largest bounds, for each result, that are scored first.
_FIRST = 4
# In place of the product of a row that is not allowed, or not there.
_NOT_ALLOWED = -(2**31)


@dataclass
class Counts:
    """What became of the queries. after_head, after_codes: rows that were left then, of all queries proven."""

    queries: int = 0
    proven: int = 0
    rows: int = 0
    after_head: int = 0
    after_codes: int = 0

    def add(self, other: "Counts") -> None:
        """Adds what another counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Piece:
    """Blocks of a segment. position: of the first row; row: of it in the segment; block: of it, in its span."""

    codes: Codes
    position: int
    row: int
    num_rows: int
    block: int

    @property
    def blocks(self) -> slice:
        """Those of the span."""
        return slice(self.block, self.block + -(-self.num_rows // BLOCK))


def require_kernel() -> Any:
    """numkong; raises MissingExtraError."""
    return extras.require("numkong", extra="search", purpose="the engine quantized")


class QuantizedEngine:
    """Reads codes of all rows and vectors of a few; rows without codes are compared one by one."""

    def __init__(self, rows: Rows) -> None:
        """Raises MissingExtraError."""
        self.rows, self.exact, self._numkong = rows, ExactEngine(rows), require_kernel()
        self.counts = Counts()
        self._lock, self._local = threading.Lock(), threading.local()
        self._opened: list[tuple[Codes, int]] | None = None
        self._is_coded_N: Mask | None = None

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """The k best of each query among the allowed rows, by inner product."""
        opened, is_coded_N = self._codes()
        num_allowed = int(np.count_nonzero(allowed_N))
        longest = float(norms(queries_QD).max(initial=0.0))
        longest *= max((segment.largest_norm for segment in self.rows.segments), default=0.0)
        # Few rows are read as they are, and products that overflow are for the exact engine to refuse.
        if not opened or 64 * num_allowed < len(self.rows) or 4 * k > num_allowed or longest > _LARGEST_PRODUCT:
            with self._lock:
                self.counts.queries += len(queries_QD)
            return self.exact.search(queries_QD, k, allowed_N)
        results: list[Found] = []
        for start in range(0, len(queries_QD), _QUERIES):
            part_QD = queries_QD[start : start + _QUERIES]
            others_N = allowed_N & ~is_coded_N if is_coded_N is not None else None
            found = self.exact.search(part_QD, k, others_N) if others_N is not None and others_N.any() else None
            search = _Search(self, part_QD, k, None if num_allowed == len(self.rows) else allowed_N, found)
            for span in _spans(opened, _PRODUCTS // len(part_QD) // BLOCK):
                search.read(span)
            with self._lock:
                self.counts.add(search.counts())
            for number, one in enumerate(search.results()):
                results.append(one or self.exact.search(part_QD[number : number + 1], k, allowed_N)[0])
        return results

    def _codes(self) -> tuple[list[tuple[Codes, int]], Mask | None]:
        """The codes that are whole and the positions of their first rows, and which rows have some; None: all."""
        with self._lock:
            if self._opened is None:
                self._opened, is_coded_N = [], np.zeros(len(self.rows), dtype=np.bool_)
                for segment, start in zip(self.rows.segments, self.rows.starts, strict=False):
                    file = segment.derived(NAME)
                    if file is None:
                        continue
                    try:
                        codes = Codes(file, segment)
                        codes.check()
                    except DataError as error:
                        warn_without(error)
                        continue
                    self._opened.append((codes, start))
                    is_coded_N[start : start + len(segment)] = True
                self._is_coded_N = None if is_coded_N.all() else is_coded_N
            return self._opened, self._is_coded_N

    def room(self, count: int) -> ProductArray:
        """Memory of this thread for so many products, kept from one query to the next."""
        room: ProductArray | None = getattr(self._local, "room", None)
        if room is None or len(room) < count:
            room = self._local.room = np.empty(count, dtype=np.int32)
        return room[:count]

    def products(self, codes_NC: CodeArray, query: PlaneQuery, out_NQ: ProductArray) -> None:
        """The products of rows of codes with queries, in integers."""
        num_queries, columns = out_NQ.shape[1], codes_NC.shape[1]
        is_wide = len(query.codes_QC) == 1 and columns > _WIDEST
        packed = None if is_wide else self._numkong.dots_pack(query.codes_QC)
        step = max(1024, _ROWS // num_queries)
        for start in range(0, len(codes_NC), step):
            part_NC, out = codes_NC[start : start + step], out_NQ[start : start + step]
            if is_wide:
                out[:, 0] = np.asarray(self._numkong.cdist(query.codes_QC, part_NC, "dot"))[0]
            elif query.fine == 1:
                self._numkong.dots_packed(part_NC, packed, out=self._numkong.from_dlpack(out))
            else:
                both = np.empty((len(out), 2 * num_queries), dtype=np.int32)
                self._numkong.dots_packed(part_NC, packed, out=self._numkong.from_dlpack(both))
                np.multiply(both[:, :num_queries], query.fine, out=out)
                out += both[:, num_queries:]


def _spans(opened: Sequence[tuple[Codes, int]], num_blocks: int) -> Iterator[list[Piece]]:
    """All rows, in pieces of at most so many blocks together."""
    span: list[Piece] = []
    used = 0
    for codes, start in opened:
        for row in range(0, len(codes), BLOCK * num_blocks):
            num_rows = min(BLOCK * num_blocks, len(codes) - row)
            needed = -(-num_rows // BLOCK)
            if used + needed > num_blocks:
                yield span
                span, used = [], 0
            span.append(Piece(codes, start + row, row, num_rows, used))
            used += needed
    if span:
        yield span


class _Search:
    """Queries on their way through the spans, with the best rows so far."""

    def __init__(
        self, engine: QuantizedEngine, queries_QD: FloatArray, k: int, allowed_N: Mask | None, found: Any
    ) -> None:
        """allowed_N: None for all. found: of rows without codes, or None."""
        self._engine, self._queries_QD, self._k, self._allowed_N = engine, queries_QD, k, allowed_N
        nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        self._best: list[Found] = [found[number] if found is not None else nothing for number in range(len(queries_QD))]
        self._left_Q = np.zeros((len(queries_QD), 2), dtype=np.int64)
        self._rows = 0
        self._asked: dict[int, Asked] = {}
        self._most = max(_MOST_LEFT, int(_MOST_SHARE * len(engine.rows)))
        self._is_given_up_Q = np.zeros(len(queries_QD), dtype=np.bool_)

    def counts(self) -> Counts:
        """What became of the queries."""
        proven_Q = ~self._is_given_up_Q
        head, codes = self._left_Q[proven_Q].sum(axis=0).tolist()
        proven = int(proven_Q.sum())
        return Counts(len(proven_Q), proven, self._rows * proven, head, codes)

    def results(self) -> list[Found | None]:
        """The best of each query; None where the exact engine is to answer."""
        return [None if lost else one for one, lost in zip(self._best, self._is_given_up_Q.tolist(), strict=True)]

    def read(self, span: Sequence[Piece]) -> None:
        """Takes the rows of a span among the best."""
        num_queries, num_blocks = len(self._queries_QD), span[-1].blocks.stop
        self._rows += sum(piece.num_rows for piece in span)
        products_NQ = self._engine.room(num_blocks * BLOCK * num_queries).reshape(-1, num_queries)
        factor_BQ, slack_BQ = np.empty((num_blocks, num_queries)), np.empty((num_blocks, num_queries))
        for piece in span:
            if id(piece.codes) not in self._asked:
                self._asked[id(piece.codes)] = piece.codes.asked(self._queries_QD)
            asked = self._asked[id(piece.codes)].head
            first = BLOCK * piece.block
            rows = slice(piece.row, piece.row + piece.num_rows)
            out = products_NQ[first : first + piece.num_rows]
            self._engine.products(piece.codes.head_NC[rows], asked, out)
            products_NQ[first + piece.num_rows : BLOCK * piece.blocks.stop] = _NOT_ALLOWED
            blocks = slice(piece.row // BLOCK, piece.row // BLOCK + piece.blocks.stop - piece.block)
            factor_BQ[piece.blocks] = asked.factor_QB[:, blocks].T
            slack_BQ[piece.blocks] = asked.slack_QB[:, blocks].T
            if self._allowed_N is not None:
                out[~self._allowed_N[piece.position : piece.position + piece.num_rows]] = _NOT_ALLOWED
        whole = _Span(span, products_NQ, factor_BQ, slack_BQ)
        floor_Q = self._floors(whole)
        left = whole.left(floor_Q)
        for number in range(num_queries):
            if not self._is_given_up_Q[number]:
                self._take(number, whole, left[number])

    def _floors(self, span: "_Span") -> DoubleArray:
        """A score of each query that the k-th best has at least, found by scoring the rows of the largest bounds."""
        bound_BQ = span.block_bounds()
        num_blocks, num_queries = bound_BQ.shape
        wanted = _FIRST * self._k
        if wanted < num_blocks:
            at_least_Q = np.partition(bound_BQ, num_blocks - wanted, axis=0)[num_blocks - wanted]
        else:
            at_least_Q = np.full(num_queries, -np.inf)
        floor_Q = np.array([_lower(one[1][self._k - 1]) if len(one[0]) >= self._k else -np.inf for one in self._best])
        first = span.left(np.maximum(at_least_Q, floor_Q))
        for number, rows_P in enumerate(first):
            if self._is_given_up_Q[number] or not len(rows_P):
                continue
            bound_P = span.bounds(rows_P, number)
            if len(rows_P) > 16 * wanted:
                rows_P = rows_P[np.argpartition(-bound_P, 16 * wanted)[: 16 * wanted]]
                bound_P = span.bounds(rows_P, number)
            bound_P = self._with_tails(span, rows_P, number, bound_P)
            if len(rows_P) > self._k + 8:
                rows_P = rows_P[np.argpartition(-bound_P, self._k + 7)[: self._k + 8]]
            scores = self._scores(number, span.positions(rows_P))
            known = np.sort(np.concatenate([scores, self._best[number][1]]))
            if len(known) >= self._k:
                floor_Q[number] = max(floor_Q[number], _lower(known[-self._k]))
        return floor_Q

    def _take(self, number: int, span: "_Span", rows_P: IntArray) -> None:
        """Takes the rows that the heads leave of one query among its best, if these are not too many."""
        if not len(rows_P):
            return
        self._left_Q[number, 0] += len(rows_P)
        best_positions, best_scores = self._best[number]
        bound_P = self._with_tails(span, rows_P, number, span.bounds(rows_P, number))
        floor = -np.inf
        if span.has_tails and len(rows_P) > 2 * self._k:  # the tails may know better than the heads which are the best
            first = np.argpartition(-bound_P, self._k - 1)[: self._k]
            scores = np.concatenate([self._scores(number, span.positions(rows_P[first])), best_scores])
            floor = _lower(np.sort(scores)[-self._k])
        is_left_P = bound_P >= floor
        rows_P, bound_P = rows_P[is_left_P], bound_P[is_left_P]
        self._left_Q[number, 1] += len(rows_P)
        if self._left_Q[number, 1] > self._most:
            self._is_given_up_Q[number] = True
            return
        positions = span.positions(rows_P)
        scores = self._scores(number, positions)
        if (scores > np.nextafter(bound_P.astype(np.float32), np.float32(np.inf))).any():
            logger.warning("the codes are not of their vectors; see `cn-clip index check`; searching exactly")
            self._is_given_up_Q[number] = True
            return
        positions, scores = np.concatenate([best_positions, positions]), np.concatenate([best_scores, scores])
        order = np.lexsort((positions, -scores))[: self._k]
        self._best[number] = positions[order], scores[order]

    def _scores(self, number: int, positions: IntArray) -> FloatArray:
        """As the exact engine computes them."""
        return exact_scores(self._queries_QD[number], self._engine.rows.gather(positions))

    def _with_tails(self, span: "_Span", rows_P: IntArray, number: int, bound_P: DoubleArray) -> DoubleArray:
        """The bounds of rows by head and tail, from those by the head."""
        if not span.has_tails:
            return bound_P
        bound_P = bound_P.copy()
        for piece in span.pieces:
            start, stop = np.searchsorted(rows_P, [BLOCK * piece.block, BLOCK * piece.block + piece.num_rows])
            tail_NC = piece.codes.tail_NC
            is_here_P: Any = slice(start, stop)
            if (np.diff(rows_P) < 0).any():
                is_here_P = (rows_P >= BLOCK * piece.block) & (rows_P < BLOCK * piece.block + piece.num_rows)
            here_P = rows_P[is_here_P] - BLOCK * piece.block + piece.row
            if tail_NC is None or not len(here_P):
                continue
            head, tail = self._asked[id(piece.codes)].head, self._asked[id(piece.codes)].tail
            is_dense = len(here_P) > _MOST_GATHERED * piece.num_rows
            chosen_NC = tail_NC[piece.row : piece.row + piece.num_rows] if is_dense else tail_NC[here_P]
            out_N1 = np.empty((len(chosen_NC), 1), dtype=np.int32)
            self._engine.products(chosen_NC, tail.of(number), out_N1)
            products_P = out_N1[here_P - piece.row, 0] if is_dense else out_N1[:, 0]
            lengths, blocks_P = piece.codes.layout.lengths, here_P // BLOCK
            of_lengths_P = piece.codes.head_NC[here_P, lengths] @ head.exact(number)[lengths]
            bound_P[is_here_P] += (
                tail.factor_QB[number, blocks_P] * products_P
                + tail.slack_QB[number, blocks_P]
                - head.factor_QB[number, blocks_P] * of_lengths_P
            )
        return bound_P


class _Span:
    """The products of the heads of some rows, and what makes them bounds. Rows count from 0 in a span, with gaps."""

    def __init__(
        self, pieces: Sequence[Piece], products_NQ: ProductArray, factor_BQ: DoubleArray, slack_BQ: DoubleArray
    ) -> None:
        self.pieces, self._products_NQ = pieces, products_NQ
        self._factor_BQ, self._slack_BQ = factor_BQ, slack_BQ
        self.has_tails = any(piece.codes.tail_NC is not None for piece in pieces)

    def block_bounds(self) -> DoubleArray:
        """The largest bound in each block."""
        num_blocks, num_queries = self._factor_BQ.shape
        if num_queries == 1:
            largest_BQ = self._products_NQ.reshape(num_blocks, BLOCK).max(axis=1)[:, None]
        else:
            largest_BQ = self._products_NQ.reshape(num_blocks, BLOCK, num_queries).max(axis=1)
        bounds_BQ: DoubleArray = self._factor_BQ * largest_BQ + self._slack_BQ
        bounds_BQ[largest_BQ == _NOT_ALLOWED] = -np.inf
        return bounds_BQ

    def left(self, floor_Q: DoubleArray) -> list[IntArray]:
        """The allowed rows of each query, rising, whose bounds are not below a floor."""
        num_blocks, num_queries = self._factor_BQ.shape
        # One less, for what float64 rounds.
        with np.errstate(invalid="ignore"):  # no floor is above the bound of a block of which nothing is known
            least_BQ = np.floor((floor_Q - self._slack_BQ) / self._factor_BQ) - 1
        limit_BQ = np.minimum(np.fmax(least_BQ, _NOT_ALLOWED + 1), -(_NOT_ALLOWED + 1)).astype(np.int32)
        if num_queries == 1:
            is_left = self._products_NQ.reshape(num_blocks, BLOCK) >= limit_BQ
            return [np.flatnonzero(is_left)]
        is_left = self._products_NQ.reshape(num_blocks, BLOCK, num_queries) >= limit_BQ[:, None]
        flat = np.flatnonzero(is_left)
        queries, rows = flat % num_queries, flat // num_queries
        order = np.argsort(queries, kind="stable")
        return np.split(rows[order], np.searchsorted(queries[order], np.arange(1, num_queries)))

    def bounds(self, rows_P: IntArray, number: int) -> DoubleArray:
        """The bounds of rows by their heads, for a query."""
        blocks_P = rows_P // BLOCK
        bounds_P: DoubleArray = (
            self._factor_BQ[blocks_P, number] * self._products_NQ[rows_P, number] + self._slack_BQ[blocks_P, number]
        )
        return bounds_P

    def positions(self, rows_P: IntArray) -> IntArray:
        """Where rows are among all rows."""
        if len(self.pieces) == 1:
            return rows_P + self.pieces[0].position
        starts = np.array([BLOCK * piece.block for piece in self.pieces])
        shifts = np.array([piece.position - BLOCK * piece.block for piece in self.pieces])
        positions_P: IntArray = rows_P + shifts[np.searchsorted(starts, rows_P, side="right") - 1]
        return positions_P


def _lower(score: np.floating) -> float:
    """What every score of at least this one is above before it is rounded to float32."""
    return float(np.nextafter(np.float32(score), np.float32(-np.inf)))
