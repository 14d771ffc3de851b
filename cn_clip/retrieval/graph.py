"""Search with a graph (HNSW, of usearch): candidates from it, ordered by exact scores."""

# Q queries, N rows of all segments, B rows of a block, C candidates, D dimensions

import contextlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip import extras
from cn_clip.digests import FileFacts, is_whole
from cn_clip.errors import DataError, lacked_memory
from cn_clip.retrieval.engines import BLOCK, ExactEngine, Found, Mask, Rows
from cn_clip.retrieval.manifest import unreadable
from cn_clip.retrieval.segments import FloatArray, IntArray

logger = logging.getLogger(__name__)

# Of 30,000 random vectors of 64 numbers, the hardest case, these find 99 % of the ten best; 16, 128, 96 find 75 %.
GRAPH_OPTIONS = {"connectivity": 32, "expansion_add": 128, "expansion_search": 192}
GRAPH_TYPE = "f16"
# Fewer rows than these are searched exactly, which is faster then: of all there are, and of those a filter admits.
SMALLEST_GRAPH = 1024
# Candidates of the graph for each result, before they are ordered by exact scores.
OVERFETCH = 2


class GraphEngine:
    """The graph over the rows of keys below `next_key`, and the exact engine over the later ones.

    Candidates of the graph are ordered by exact scores. Where it would have to look at many rows for the few that a
    filter admits, gives fewer results than there are, or may have left out some that score like the last of them, the
    exact engine answers; and always once the graph has failed, which is logged.
    """

    def __init__(self, rows: Rows, graph: "Graph", next_key: int) -> None:
        self.rows, self.exact = rows, ExactEngine(rows)
        self.graph: Graph | None = graph
        self.in_graph_N: Mask = rows.keys_N < next_key

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """The k best of each query among the allowed rows, by the graph; rows that it lacks are compared one by one."""
        within_N = allowed_N & self.in_graph_N
        wanted = min(k, int(within_N.sum()))
        keys_per_query = self._candidates(queries_QD, wanted, int(within_N.sum()))
        if keys_per_query is None:
            return self.exact.search(queries_QD, k, allowed_N)
        later_N = allowed_N & ~self.in_graph_N
        later = self.exact.search(queries_QD, k, later_N) if later_N.any() else None
        results: list[Found] = []
        for number, keys in enumerate(keys_per_query):
            positions = self._positions(keys, within_N)
            if len(positions) < wanted:
                results.extend(self.exact.search(queries_QD[number : number + 1], k, allowed_N))
                continue
            best = self._best(queries_QD[number], positions, later[number][0] if later is not None else None, k)
            results.append(best or self.exact.search(queries_QD[number : number + 1], k, allowed_N)[0])
        return results

    def _candidates(self, queries_QD: FloatArray, wanted: int, num_allowed: int) -> Sequence[IntArray] | None:
        """Keys for each query; None where reading all rows that are allowed is the better way, or the only one."""
        graph = self.graph
        if graph is None or num_allowed < SMALLEST_GRAPH:
            return None
        count = int(OVERFETCH * wanted * len(graph) / num_allowed) + 16
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
        positions = np.unique(np.searchsorted(self.rows.keys_N, np.sort(keys)))
        positions = positions[positions < len(self.rows)]
        kept: IntArray = positions[allowed_N[positions] & np.isin(self.rows.keys_N[positions], keys)]
        return kept

    def _best(self, query_D: FloatArray, positions: IntArray, later: IntArray | None, k: int) -> Found | None:
        """None where the k-th is no better than the last candidate: then others may score alike, and come first."""
        num_candidates = len(positions)
        if later is not None:
            positions = np.concatenate([positions, later])
        scores = (self.rows.gather(positions).astype(np.float64) * query_D).sum(axis=1).astype(np.float32)
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


class Graph:
    """A graph of usearch, which is called only here: whatever it raises becomes a DataError naming `where`.

    What says that memory ran out is left as it is, for `errors.lacked_memory`.
    """

    def __init__(self, embed_dim: int, where: object = "the graph") -> None:
        """Empty, in memory; raises MissingExtraError."""
        usearch, self._where = require_usearch(), where
        with self._translated():
            self._index = usearch.Index(ndim=embed_dim, metric="ip", dtype=GRAPH_TYPE, **GRAPH_OPTIONS)

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries_QD: FloatArray, count: int) -> list[IntArray]:
        """The keys of up to `count` rows near each query, best first."""
        with self._translated():
            matches = self._index.search(queries_QD, count)
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
        """Removes the keys of rows that are gone, and adds the rows of larger keys."""
        known_N = rows.keys_N < known_below
        with self._translated():
            gone = np.setdiff1d(np.asarray(self._index.keys, dtype=np.int64), rows.keys_N[alive_N & known_N])
            if len(gone):
                self._index.remove(gone.astype(np.uint64))
        positions = np.flatnonzero(alive_N & ~known_N)
        for start in range(0, len(positions), BLOCK):
            part = positions[start : start + BLOCK]
            vectors_BD = rows.gather(part)
            with self._translated():
                self._index.add(rows.keys_N[part].astype(np.uint64), vectors_BD)

    def save(self, path: Path) -> None:
        """Writes a file."""
        with self._translated():
            self._index.save(str(path))

    def has(self, embed_dim: int, num_rows: int) -> bool:
        """Whether it may be that of an index of so many rows."""
        with self._translated():
            return bool(self._index.ndim == embed_dim and len(self._index) <= num_rows)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # bare RuntimeErrors, and others
            if lacked_memory(error):
                raise
            raise DataError(f"usearch fails ({error})", at=self._where) from error


def open_graph(path: Path, facts: FileFacts, embed_dim: int, num_rows: int) -> Graph:
    """The graph of a file, memory-mapped; raises DataError when the file is not as it was written, UnreadableError.

    Its digest is compared before usearch sees it: usearch reads one changed bit as an address, and the process ends.
    """
    _require_whole(path, facts)
    graph = Graph(embed_dim, path)
    graph.open(path, mapped=True)
    if not graph.has(embed_dim, num_rows):
        raise DataError(f"is not a graph of {num_rows} rows of {embed_dim} dimensions", at=path)
    return graph


def extended_graph(path: Path, facts: FileFacts, rows: Rows, alive_N: Mask, known_below: int) -> Graph:
    """The graph in `path`, which knows the rows of keys below `known_below`, as one in memory of the rows alive.

    Raises as `open_graph`.
    """
    _require_whole(path, facts)
    graph = Graph(rows.segments[0].embed_dim, path)
    graph.open(path, mapped=False)
    graph.extend(rows, alive_N, known_below)
    return graph


def new_graph(rows: Rows, alive_N: Mask) -> Graph:
    """A graph in memory of the rows alive."""
    graph = Graph(rows.segments[0].embed_dim)
    graph.extend(rows, alive_N, 0)
    return graph


def _require_whole(path: Path, facts: FileFacts) -> None:
    try:
        if is_whole(path, facts):
            return
    except OSError as error:
        raise unreadable(path, error) from error
    raise DataError("is damaged: its bytes are not those that were written", at=path)
