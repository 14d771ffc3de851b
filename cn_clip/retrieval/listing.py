"""The orders in which an index is looked through without a query: the newest items first, or the most typical."""

# N rows of all segments, removed ones included, D dimensions

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from cn_clip.retrieval.engines import BLOCK, Mask, Rows
from cn_clip.retrieval.segments import FloatArray, IntArray, ItemId

Order: TypeAlias = Literal["newest", "typical"]
ORDERS: tuple[Order, ...] = get_args(Order)
# (how many items there are in all, some of them with their metadata)
Page: TypeAlias = tuple[int, list[tuple[ItemId, dict[str, Any]]]]


def newest(dates: Sequence[Any], times_ns: Sequence[Any], alive_N: Mask) -> IntArray:
    """Rows that are alive, the newest first, equal ones in order of insertion, those without any time last.

    dates: texts such as 2021-05-03T14:22:10, by code point. times_ns: nanoseconds since 1970, where a row has no date.
    A photo dated 2021-05-03 comes before a file of 2019 and after one of 2022.
    """
    rows = np.flatnonzero(alive_N).tolist()
    keys = [date if isinstance(date, str) else _date(time_ns) for date, time_ns in zip(dates, times_ns, strict=True)]
    return np.array(sorted(rows, key=keys.__getitem__, reverse=True), dtype=np.int64)


def _date(time_ns: Any) -> str:
    """Local time as cameras write it; "" for no time."""
    if type(time_ns) is not int:
        return ""
    try:
        return datetime.datetime.fromtimestamp(time_ns / 1e9).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return ""


def typical(rows: Rows, alive_N: Mask) -> IntArray:
    """Rows that are alive, those first whose vectors are nearest to the mean of all; equal ones in order of insertion.

    Of [1, 0], [0.6, 0.8] and [0, 1] the second is the most typical: the mean is [0.53, 0.6].
    """
    sum_D = np.zeros(rows.segments[0].embed_dim if rows.segments else 0, dtype=np.float64)
    scores_N = np.full(len(rows), -np.inf, dtype=np.float32)
    for start, stop, vectors_BD in _blocks(rows):
        sum_D += vectors_BD[alive_N[start:stop]].sum(axis=0, dtype=np.float64)
    mean_D = (sum_D / max(1, int(alive_N.sum()))).astype(np.float32)
    for start, stop, vectors_BD in _blocks(rows):
        scores_N[start:stop] = vectors_BD @ mean_D
    kept = np.flatnonzero(alive_N)
    ordered: IntArray = kept[np.argsort(-scores_N[kept], kind="stable")]
    return ordered


def _blocks(rows: Rows) -> Iterator[tuple[int, int, FloatArray]]:
    """(start, stop, their vectors) of all rows."""
    for segment, first in zip(rows.segments, rows.starts, strict=False):
        for offset in range(0, len(segment), BLOCK):
            stop = min(offset + BLOCK, len(segment))
            yield first + offset, first + stop, segment.vectors(offset, stop).astype(np.float32, copy=False)
