"""Search with a graph (HNSW, of usearch): candidates from it, ordered by exact scores.

A graph is made of codes: vectors times a scale, rounded to integers of 8 bits. Only the order of the candidates is
theirs, and a constant factor changes no order.
"""

# Q queries, N rows of all segments, B rows of a block, C candidates, D dimensions

import contextlib
import functools
import logging
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip import extras
from cn_clip.digests import FileFacts, is_whole
from cn_clip.errors import DataError, lacked_memory
from cn_clip.processes import usable_cores
from cn_clip.retrieval.engines import BLOCK, ExactEngine, Found, Mask, Rows
from cn_clip.retrieval.manifest import unreadable
from cn_clip.retrieval.scanning import exact_scores, norms
from cn_clip.retrieval.segments import FloatArray, IntArray

logger = logging.getLogger(__name__)

Codes: TypeAlias = NDArray[np.int8]

GRAPH_OPTIONS = {"connectivity": 32, "expansion_add": 128}
# How many rows a search keeps in view, at least. The easier the vectors, the fewer suffice: the features of 200,000
# pictures want 60, random vectors of 64 numbers 192. So a graph is tried when it is made, with rows that were pushed
# half-way out of their crowd, as the text of a picture lies outside that of the pictures (rows as they are find
# themselves with any width). Texts lie further out: the width after the first that finds this share of the ten best.
WIDTHS = (56, 80, 112, 160, 224, 320, 448, 640)
WANTED_RECALL = 0.998
NUM_TRIED = 200
# Of graphs from before it was measured.
FORMER_WIDTH = 192
# Fewer rows than these are searched exactly, which is faster then: of all there are, and of those a filter admits.
SMALLEST_GRAPH = 1024
# Rows that are added at the same time do not see each other. In a graph of few rows some then lie where no search comes
# by, or a search must be ten times as wide: the first rows are added one after the other.
ADDED_ALONE = 4096
# Candidates of the graph for each result, before they are ordered by exact scores; where some are not admitted, more.
CANDIDATES = 1.5
OVERFETCH = 2
# A graph keeps codes of 8 bits: half the bytes of float16 and a third of the time. They must keep this share of what
# distinguishes the vectors; a graph of vectors for which they do not keeps float16.
LARGEST_LOSS = 0.02
_CODED = 127
_SAMPLE = 4096
_MASKS_KEPT = 8


class _Admitted(NamedTuple):
    """What a mask means here: it is reckoned once, for a query must not look at all rows. later_N: None for none."""

    allowed_N: Mask
    within_N: Mask
    num_within: int
    later_N: Mask | None


class GraphEngine:
    """The graph over the rows of keys below `next_key`, and the exact engine over the later ones.

    Candidates of the graph are ordered by exact scores. Where it would have to look at many rows for the few that a
    filter admits, gives fewer results than there are, or may have left out some that score like the last of them, the
    exact engine answers; and always once the graph has failed, which is logged.
    """

    def __init__(self, rows: Rows, graph: "Graph", next_key: int) -> None:
        self.rows, self.exact = rows, ExactEngine(rows)
        self.graph: Graph | None = graph
        self._next_key = next_key
        self._masks: tuple[_Admitted, ...] = ()

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """The k best of each query among the allowed rows, by the graph; rows that it lacks are compared one by one.

        allowed_N is known again by identity: it must not be changed afterwards.
        """
        admitted = self._admitted(allowed_N)
        wanted = min(k, admitted.num_within)
        keys_per_query = self._candidates(queries_QD, wanted, admitted.num_within)
        if keys_per_query is None:
            return self.exact.search(queries_QD, k, allowed_N)
        later = None if admitted.later_N is None else self.exact.search(queries_QD, k, admitted.later_N)
        results: list[Found] = []
        for number, keys in enumerate(keys_per_query):
            positions = self._positions(keys, admitted.within_N)
            if len(positions) < wanted:
                results.extend(self.exact.search(queries_QD[number : number + 1], k, allowed_N))
                continue
            best = self._best(queries_QD[number], positions, later[number][0] if later is not None else None, k)
            results.append(best or self.exact.search(queries_QD[number : number + 1], k, allowed_N)[0])
        return results

    @functools.cached_property
    def _num_in_graph(self) -> int:
        return int(np.searchsorted(self.rows.keys_N, self._next_key))

    def _admitted(self, allowed_N: Mask) -> _Admitted:
        for known in self._masks:
            if known.allowed_N is allowed_N:
                return known
        within_N, later_N = allowed_N, None
        if allowed_N[self._num_in_graph :].any():
            within_N, later_N = allowed_N.copy(), allowed_N.copy()
            within_N[self._num_in_graph :] = False
            later_N[: self._num_in_graph] = False
        made = _Admitted(allowed_N, within_N, int(np.count_nonzero(within_N)), later_N)
        self._masks = (made, *self._masks[: _MASKS_KEPT - 1])
        return made

    def _candidates(self, queries_QD: FloatArray, wanted: int, num_allowed: int) -> Sequence[IntArray] | None:
        """Keys for each query; None where reading all rows that are allowed is the better way, or the only one."""
        graph = self.graph
        if graph is None or num_allowed < SMALLEST_GRAPH:
            return None
        count = int(CANDIDATES * wanted) + 8
        if num_allowed < len(graph):
            count = max(count, int(OVERFETCH * wanted * len(graph) / num_allowed) + 16)
        if 4 * count >= num_allowed:
            return None
        try:
            return graph.search(queries_QD, min(count, len(graph)))
        except DataError as error:
            logger.warning("%s; %s", error, WITHOUT_GRAPH)
            self.graph = None
            return None

    def _positions(self, keys: IntArray, allowed_N: Mask) -> IntArray:
        """Where the keys are, rising; those of rows that are gone or not allowed are left out."""
        keys = np.sort(keys)
        positions = np.minimum(np.searchsorted(self.rows.keys_N, keys), len(self.rows) - 1)
        kept: IntArray = positions[(self.rows.keys_N[positions] == keys) & allowed_N[positions]]
        return kept

    def _best(self, query_D: FloatArray, positions: IntArray, later: IntArray | None, k: int) -> Found | None:
        """None where the k-th is no better than the last candidate: then others may score alike, and come first."""
        num_candidates = len(positions)
        if later is not None:
            positions = np.concatenate([positions, later])
        # Straight from float16 to float64: numpy takes twice as long for float16 to float32.
        scores = exact_scores(query_D, self.rows.gather(positions, np.float64))
        order = np.argsort(-scores, kind="stable")[:k]
        if num_candidates > k and scores[order[-1]] == scores[:num_candidates].min():
            return None
        return positions[order], scores[order]


def require_usearch() -> Any:
    """The module; raises MissingExtraError."""
    return extras.require("usearch.index", extra="search", purpose="the engine usearch")


# What follows the reason.
WITHOUT_GRAPH = (
    "searching exactly, which is slower, until `cn-clip index build` or `cn-clip index check --repair` makes the graph "
    "again"
)


class Kind(NamedTuple):
    """What a manifest records of a graph. scale: of its codes, None: it keeps float16; width: see `WIDTHS`."""

    scale: float | None = None
    width: int | None = None


FORMER = Kind()


class Graph:
    """A graph of usearch, which is called only here: whatever it raises becomes a DataError naming `where`.

    What says that memory ran out is left as it is, for `errors.lacked_memory`.
    """

    def __init__(self, embed_dim: int, where: object = "the graph", kind: Kind = FORMER) -> None:
        """Empty, in memory; raises MissingExtraError."""
        usearch, self._where, self.kind = require_usearch(), where, kind
        self._type = "f16" if kind.scale is None else "i8"
        options = {**GRAPH_OPTIONS, "expansion_search": kind.width or FORMER_WIDTH}
        with self._translated():
            self._index = usearch.Index(ndim=embed_dim, metric="ip", dtype=self._type, **options)

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries_QD: FloatArray, count: int) -> list[IntArray]:
        """The keys of up to `count` rows near each query, best first."""
        threads = min(len(queries_QD), usable_cores())  # for each it is asked for, usearch starts one: 0 means all
        with self._translated():
            matches = self._index.search(self._kept(_units(queries_QD)), count, threads=threads)
            keys_QC = np.asarray(matches.keys).reshape(len(queries_QD), -1).astype(np.int64)
            counts = getattr(matches, "counts", [keys_QC.shape[1]] * len(queries_QD))
            return [keys[: int(num)] for keys, num in zip(keys_QC, counts, strict=True)]

    def open(self, path: Path, *, mapped: bool) -> None:
        """Takes what the file holds, a whole one; mapped: it is not to be changed then. Raises UnreadableError.

        usearch gets the map and not the path: of a file that is gone by then, usearch 2.26 closes descriptor 0, whose
        ever it is.
        """
        try:
            with open(path, "rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(path, error) from error
        take = self._index.view if mapped else self._index.load
        with self._translated():
            try:
                take(data)
            except TypeError:  # versions before 2.19 or so take bytes or a path
                take(str(path))
        # usearch keeps addresses in it and no reference to it.
        self._data = data if mapped else None

    def extend(self, rows: Rows, alive_N: Mask, known_below: int) -> None:
        """Removes the keys of rows that are gone, and adds the rows of larger keys.

        Raises DataError for vectors that codes of this scale do not hold.
        """
        known_N, num_before = rows.keys_N < known_below, len(self)
        with self._translated():
            gone = np.setdiff1d(np.asarray(self._index.keys, dtype=np.int64), rows.keys_N[alive_N & known_N])
            if len(gone):
                self._index.remove(gone.astype(np.uint64))
        positions, scale = np.flatnonzero(alive_N & ~known_N), self.kind.scale
        start = 0
        while start < len(positions):
            is_small = len(self) < ADDED_ALONE
            part = positions[start : start + (min(BLOCK, ADDED_ALONE - len(self)) if is_small else BLOCK)]
            vectors_BD = rows.gather(part)
            if scale is not None and _cut_off(vectors_BD, scale) > LARGEST_LOSS:
                raise DataError(f"holds no vectors of numbers above {_CODED / scale:g}", at=self._where)
            with self._translated():
                threads = 1 if is_small else usable_cores()
                self._index.add(rows.keys_N[part].astype(np.uint64), self._kept(vectors_BD), threads=threads)
            start += len(part)
        # Reading all rows for it is worth while where there are about twice as many.
        if num_before.bit_length() < len(self).bit_length():
            with contextlib.suppress(DataError):  # a row that cannot be read, and need not be
                self._measure_width(rows, alive_N)

    def _measure_width(self, rows: Rows, alive_N: Mask) -> None:
        positions = np.flatnonzero(alive_N)
        tried_QD = _units(rows.gather(positions[:: max(1, len(positions) // NUM_TRIED)]))
        aside_QD = _units(np.random.default_rng(2017).normal(size=tried_QD.shape))
        queries_QD, k = _units(tried_QD + aside_QD), min(10, len(positions))
        best = [rows.keys_N[found] for found, _ in ExactEngine(rows).search(queries_QD, k, alive_N)]
        is_enough = False
        for width in WIDTHS:
            with self._translated():
                self._index.expansion_search = width
            self.kind = self.kind._replace(width=width)
            if is_enough:
                break
            found = self.search(queries_QD, int(CANDIDATES * k) + 8)
            shares = [np.isin(wanted, keys).mean() for wanted, keys in zip(best, found, strict=True)]
            is_enough = bool(np.mean(shares) >= WANTED_RECALL)

    def save(self, path: Path) -> None:
        """Writes a file."""
        with self._translated():
            self._index.save(str(path))

    def has(self, embed_dim: int, num_rows: int) -> bool:
        """Whether it may be that of an index of so many rows."""
        with self._translated():
            found = str(getattr(self._index.dtype, "name", self._index.dtype)).lower()
            is_alike = self._index.ndim == embed_dim and found == self._type
            return bool(is_alike and len(self._index) <= num_rows)

    def _kept(self, vectors_BD: FloatArray) -> NDArray[Any]:
        return vectors_BD if self.kind.scale is None else _codes(vectors_BD, self.kind.scale)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # bare RuntimeErrors, and others
            if lacked_memory(error):
                raise
            raise DataError(f"usearch fails ({error})", at=self._where) from error


def _units(queries_QD: NDArray[np.floating]) -> FloatArray:
    """Of length 1, as codes want them; a query of zeros stays one."""
    lengths_Q = norms(queries_QD)
    unit_QD: FloatArray = (queries_QD / np.where(lengths_Q > 0, lengths_Q, 1)[:, None]).astype(np.float32)
    return unit_QD


def _codes(vectors_BD: FloatArray, scale: float) -> Codes:
    coded_BD = vectors_BD * np.float32(scale)
    np.rint(coded_BD, out=coded_BD)
    np.clip(coded_BD, -_CODED, _CODED, out=coded_BD)
    codes: Codes = coded_BD.astype(np.int8)
    return codes


def _cut_off(vectors_BD: FloatArray, scale: float) -> float:
    """The largest share of a row's length that lies beyond what codes can say."""
    limit = _CODED / scale
    outside_B = np.square(np.maximum(np.abs(vectors_BD) - limit, 0)).sum(axis=1)
    return float((outside_B / np.maximum(np.square(vectors_BD).sum(axis=1), np.finfo(np.float32).tiny)).max(initial=0))


def code_scale(rows: Rows, alive_N: Mask) -> float | None:
    """By what vectors are multiplied to become codes, from a sample of the rows; None where codes would lose too much.

    What distinguishes vectors is how far their numbers lie from the mean of each. Where numbers reach 0.5, a step of
    the codes is 0.5/127 = 0.004, and rounding has a variance of 0.004²/12: 1.3 % of that of numbers that deviate by
    0.01.
    """
    positions = np.flatnonzero(alive_N)
    sample_BD = rows.gather(positions[:: max(1, len(positions) // _SAMPLE)])
    largest = float(np.abs(sample_BD).max(initial=0))
    if not largest:
        return None
    scale = _CODED / largest
    lost_BD = sample_BD - _codes(sample_BD, scale) / np.float32(scale)
    spread = float(sample_BD.var(axis=0, dtype=np.float64).sum())
    return scale if float(np.square(lost_BD, dtype=np.float64).mean(axis=0).sum()) <= LARGEST_LOSS * spread else None


def open_graph(path: Path, facts: FileFacts, embed_dim: int, num_rows: int, kind: Kind) -> Graph:
    """The graph of a file, memory-mapped; raises DataError when the file is not as it was written, UnreadableError.

    Its digest is compared before usearch sees it: usearch reads one changed bit as an address, and the process ends.
    """
    _require_whole(path, facts)
    graph = Graph(embed_dim, path, kind)
    graph.open(path, mapped=True)
    if not graph.has(embed_dim, num_rows):
        raise DataError(f"is not a graph of {num_rows} rows of {embed_dim} dimensions", at=path)
    return graph


def extended_graph(path: Path, facts: FileFacts, rows: Rows, alive_N: Mask, known_below: int, kind: Kind) -> Graph:
    """The graph in `path`, which knows the rows of keys below `known_below`, as one in memory of the rows alive.

    Raises as `open_graph`, and DataError where the rows no longer fit codes of that scale.
    """
    _require_whole(path, facts)
    graph = Graph(rows.segments[0].embed_dim, path, kind)
    graph.open(path, mapped=False)
    graph.extend(rows, alive_N, known_below)
    return graph


def new_graph(rows: Rows, alive_N: Mask) -> Graph:
    """A graph in memory of the rows alive."""
    embed_dim, scale = rows.segments[0].embed_dim, code_scale(rows, alive_N)
    if scale is not None:
        with contextlib.suppress(DataError):
            graph = Graph(embed_dim, kind=Kind(scale))
            graph.extend(rows, alive_N, 0)
            return graph
    graph = Graph(embed_dim)
    graph.extend(rows, alive_N, 0)
    return graph


def _require_whole(path: Path, facts: FileFacts) -> None:
    try:
        if is_whole(path, facts):
            return
    except OSError as error:
        raise unreadable(path, error) from error
    raise DataError("is damaged: its bytes are not those that were written", at=path)
