"""How the rows of an index are searched: exactly, block by block, or with a graph (HNSW, of usearch)."""

# Q queries, N rows of all segments, B rows of a block, D dimensions, K results

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip import extras
from cn_clip.errors import DataError
from cn_clip.retrieval.segments import FloatArray, IntArray, Segment

Found: TypeAlias = tuple[IntArray, FloatArray]
Mask: TypeAlias = NDArray[np.bool_]

BLOCK = 32768
# Of 30,000 random vectors of 64 numbers, the hardest case, these find 99 % of the ten best; 16, 128, 96 find 75 %.
GRAPH_OPTIONS = {"connectivity": 32, "expansion_add": 128, "expansion_search": 192}
GRAPH_TYPE = "f16"
# Fewer rows than these are searched exactly, which is faster then: of all there are, and of those a filter admits.
SMALLEST_GRAPH = 1024
# Candidates of the graph for each result, before they are ordered by exact scores.
OVERFETCH = 2


class Rows:
    """The vectors of all segments by place, in order of insertion, and their keys, which rise."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.starts = [0, *itertools.accumulate(map(len, segments))]
        keys = [segment.keys_N for segment in segments]
        self.keys_N: IntArray = np.concatenate([np.empty(0, dtype=np.int64), *keys])

    def __len__(self) -> int:
        return self.starts[-1]

    def segment_of(self, place: int) -> tuple[Segment, int]:
        """(segment, row in it) of a place."""
        number = bisect.bisect_right(self.starts, place) - 1
        return self.segments[number], place - self.starts[number]

    def gather(self, places: IntArray) -> FloatArray:
        """Vectors (len(places), D), float32."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        width = self.segments[0].vectors_ND.shape[1] if self.segments else 0
        vectors = np.empty((len(places), width), dtype=np.float32)
        for number in np.unique(numbers):
            chosen = numbers == number
            vectors[chosen] = self.segments[number].vectors_ND[places[chosen] - self.starts[number]]
        return vectors


class Engine(Protocol):
    """Finds rows."""

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """(places, scores) of each query among the allowed rows, best first, equal scores in order of insertion."""
        ...


class ExactEngine:
    """Reads every allowed row; memory: a block."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        from cn_clip.retrieval import flat

        places = np.empty((len(queries_QD), 0), dtype=np.int64)
        scores = np.empty((len(queries_QD), 0), dtype=np.float32)
        for segment, start in zip(self.rows.segments, self.rows.starts, strict=False):
            for offset in range(0, len(segment), BLOCK):
                first = start + offset
                chosen_B = np.flatnonzero(allowed_N[first : min(first + BLOCK, start + len(segment))])
                if not len(chosen_B):
                    continue
                found = flat.top_k(queries_QD, _block(segment, offset, chosen_B), k)
                places = np.concatenate([places, first + chosen_B[found.indices]], axis=1)
                scores = np.concatenate([scores, found.scores], axis=1)
                # Stable: of equal scores the earlier block, and in it the earlier row, stays in front.
                order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
                places, scores = np.take_along_axis(places, order, axis=1), np.take_along_axis(scores, order, axis=1)
        return list(zip(places, scores, strict=True))


def _block(segment: Segment, offset: int, chosen_B: IntArray) -> FloatArray:
    count = min(BLOCK, len(segment) - offset)
    block = segment.vectors_ND[offset : offset + count]
    return np.ascontiguousarray(block if len(chosen_B) == count else block[chosen_B], dtype=np.float32)


class GraphEngine:
    """The graph over the rows of keys below `next_key`, and the exact engine over the later ones.

    Candidates of the graph are ordered by exact scores. Where it would have to look at many rows for the few that a
    filter admits, gives fewer results than there are, or may have left out some that score like the last of them, the
    exact engine answers.
    """

    def __init__(self, rows: Rows, graph: Any, next_key: int) -> None:
        self.rows, self.graph, self.exact = rows, graph, ExactEngine(rows)
        self.in_graph_N: Mask = rows.keys_N < next_key

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        within_N = allowed_N & self.in_graph_N
        wanted = min(k, int(within_N.sum()))
        count = self._num_candidates(wanted, int(within_N.sum()))
        if count is None:
            return self.exact.search(queries_QD, k, allowed_N)
        later_N = allowed_N & ~self.in_graph_N
        later = self.exact.search(queries_QD, k, later_N) if later_N.any() else None
        keys_per_query = self._candidates(queries_QD, count)
        results: list[Found] = []
        for number, keys in enumerate(keys_per_query):
            places = self._places(keys, within_N)
            if len(places) < wanted:
                results.extend(self.exact.search(queries_QD[number : number + 1], k, allowed_N))
                continue
            best = self._best(queries_QD[number], places, later[number][0] if later is not None else None, k)
            results.append(best or self.exact.search(queries_QD[number : number + 1], k, allowed_N)[0])
        return results

    def _num_candidates(self, wanted: int, num_allowed: int) -> int | None:
        """How many rows to ask the graph for; None where reading all that are allowed is the better way."""
        if num_allowed < SMALLEST_GRAPH:
            return None
        count = int(OVERFETCH * wanted * len(self.graph) / num_allowed) + 16
        return count if 4 * count < num_allowed else None

    def _candidates(self, queries_QD: FloatArray, count: int) -> Sequence[IntArray]:
        matches = self.graph.search(queries_QD, min(count, len(self.graph)))
        keys_QC = np.asarray(matches.keys).reshape(len(queries_QD), -1).astype(np.int64)
        counts = getattr(matches, "counts", [keys_QC.shape[1]] * len(queries_QD))
        return [keys[: int(num)] for keys, num in zip(keys_QC, counts, strict=True)]

    def _places(self, keys: IntArray, allowed_N: Mask) -> IntArray:
        """Where the keys are, rising; those of rows that are gone or not allowed are left out."""
        places = np.unique(np.searchsorted(self.rows.keys_N, np.sort(keys)))
        places = places[places < len(self.rows)]
        kept: IntArray = places[allowed_N[places] & np.isin(self.rows.keys_N[places], keys)]
        return kept

    def _best(self, query_D: FloatArray, places: IntArray, later: IntArray | None, k: int) -> Found | None:
        """None where the k-th is no better than the last candidate: then others may score alike, and come first."""
        num_candidates = len(places)
        if later is not None:
            places = np.concatenate([places, later])
        scores = (self.rows.gather(places).astype(np.float64) * query_D).sum(axis=1).astype(np.float32)
        order = np.argsort(-scores, kind="stable")[:k]
        if num_candidates > k and scores[order[-1]] == scores[:num_candidates].min():
            return None
        return places[order], scores[order]


def require_usearch() -> Any:
    """The module; raises MissingExtraError."""
    return extras.require("usearch.index", extra="search", purpose="the engine usearch")


def open_graph(path: Path, embed_dim: int, num_rows: int) -> Any:
    """The graph of a file, memory-mapped; raises DataError when it is none of so many rows of these dimensions."""
    usearch = require_usearch()
    graph = _empty(usearch, embed_dim)
    try:
        graph.view(str(path))
    except Exception as error:  # the binding raises bare RuntimeErrors and others
        raise DataError(f"{path}: is no graph that can be read ({error})") from error
    if graph.ndim != embed_dim or len(graph) > num_rows:
        raise DataError(f"{path}: is a graph of {len(graph)} rows of {graph.ndim} dimensions, not of this index")
    return graph


def extended_graph(path: Path | None, rows: Rows, alive_N: Mask, known_below: int) -> Any:
    """A graph in memory of the rows that are alive: the one in `path` without what is gone and with what came.

    known_below: the graph in `path` knows the rows of smaller keys. Raises DataError when `path` cannot be read.
    """
    usearch = require_usearch()
    graph = _empty(usearch, rows.segments[0].vectors_ND.shape[1])
    known_N = rows.keys_N < known_below
    if path is None:
        known_N[:] = False
    else:
        _load(graph, path)
        gone = np.setdiff1d(np.asarray(graph.keys, dtype=np.int64), rows.keys_N[alive_N & known_N])
        if len(gone):
            graph.remove(gone.astype(np.uint64))
    places = np.flatnonzero(alive_N & ~known_N)
    for start in range(0, len(places), BLOCK):
        part = places[start : start + BLOCK]
        graph.add(rows.keys_N[part].astype(np.uint64), rows.gather(part))
    return graph


def _load(graph: Any, path: Path) -> None:
    try:
        graph.load(str(path))
    except Exception as error:
        raise DataError(f"{path}: is no graph that can be read ({error})") from error


def _empty(usearch: Any, embed_dim: int) -> Any:
    return usearch.Index(ndim=embed_dim, metric="ip", dtype=GRAPH_TYPE, **GRAPH_OPTIONS)
