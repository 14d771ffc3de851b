"""How the rows of an index are searched exactly, block by block; `graph` holds the other way."""

# Q queries, N rows of all segments, B rows of a block, D dimensions, K results

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cn_clip.retrieval import scanning
from cn_clip.retrieval.segments import FloatArray, IntArray, Segment
from cn_clip.retrieval.segments import Mask as Mask

Found: TypeAlias = tuple[IntArray, FloatArray]

BLOCK = 32768


class Rows:
    """The vectors of all segments by position, in order of insertion, and their keys, which rise."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.starts = [0, *itertools.accumulate(map(len, segments))]

    def __len__(self) -> int:
        return self.starts[-1]

    @functools.cached_property
    def keys_N(self) -> IntArray:  # noqa: N802
        """All keys; 8 bytes a row."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(segment.keys_N for segment in self.segments)])

    def positions_of(self, keys: IntArray) -> IntArray:
        """Where the keys are, in any order; those of no row are passed over."""
        found = [np.empty(0, dtype=np.int64)]
        for segment, start in zip(self.segments if len(keys) else (), self.starts, strict=False):
            rows_K, is_there_K = segment.find_keys(keys)
            found.append(start + rows_K[is_there_K])
        return np.concatenate(found)

    def keys_at(self, positions: IntArray) -> IntArray:
        """The keys of rows, in any order."""
        keys = [np.empty(0, dtype=np.int64)]
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(numbers):
            keys.append(self.segments[number].keys_of(positions[numbers == number] - self.starts[number]))
        return np.concatenate(keys)

    def segment_of(self, position: int) -> tuple[Segment, int]:
        """(segment, row in it) of a position."""
        number = bisect.bisect_right(self.starts, position) - 1
        return self.segments[number], position - self.starts[number]

    def gather(self, positions: IntArray, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Vectors (len(positions), D), float32 or of a wider type."""
        if len(self.segments) == 1:
            return self.segments[0].gather(positions).astype(dtype, copy=False)
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        width = self.segments[0].embed_dim if self.segments else 0
        vectors = np.empty((len(positions), width), dtype=dtype)
        for number in sorted(set(numbers.tolist())):
            chosen = np.flatnonzero(numbers == number)
            vectors[chosen] = self.segments[number].gather(positions[chosen] - self.starts[number])
        return vectors


class Engine(Protocol):
    """Finds rows."""

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """(positions, scores) of each query among the allowed rows, best first, equal scores in order of insertion."""
        ...


class ExactEngine:
    """Reads every allowed row; memory: some MB for each core."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def search(self, queries_QD: FloatArray, k: int, allowed_N: Mask) -> Sequence[Found]:
        """The k best of each query among the allowed rows, by inner product."""
        found = scanning.best_rows(self.rows.segments, queries_QD, k, allowed_N=allowed_N)
        return list(zip(found.indices, found.scores, strict=True))
