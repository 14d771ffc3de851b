"""What an index is asked: the vector of several parts, and which items fit a condition (see `conditions`).

The command line and the service search with both. A condition is answered by the columns of each segment.
"""

# N rows, removed ones included, S rows of a stripe, V different values of it, P parts, D dimensions

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval.columns import TABLE, Columns, Stripe, columns_of
from cn_clip.retrieval.conditions import ID_FIELDS, Condition, Term
from cn_clip.retrieval.segments import FloatArray, ItemId, Mask, Segment

PartT = TypeVar("PartT")

# Below this length the parts have cancelled each other out: what is left is rounding.
SHORTEST = 1e-4


def mixed(rows_PD: FloatArray, weights: Sequence[float]) -> FloatArray:
    """The unit vector (D,) of the weighted sum of unit rows, float32; raises ConfigError when they cancel out.

    [[1, 0], [0, 1]] with the weights 3 and 4 give [0.6, 0.8].
    """
    sum_D = np.zeros(rows_PD.shape[1], dtype=np.float32)
    for row_D, weight in zip(rows_PD, weights, strict=True):
        sum_D += np.float32(weight) * row_D
    length = float(np.linalg.norm(sum_D))
    if length < SHORTEST:
        raise ConfigError("the weighted parts cancel each other out")
    unit_D: FloatArray = (sum_D / length).astype(np.float32)
    return unit_D


class ItemTable:
    """Ids and metadata of an index by column."""

    def __init__(self, segments: Sequence[Segment], alive_N: Mask) -> None:
        """segments: of all rows, of which `alive_N` are not removed."""
        self._segments = segments
        self._alive_N = alive_N
        self._starts = [0, *itertools.accumulate(map(len, segments))]
        self._fields: list[str] | None = None

    def _parts(self, work: Callable[[Columns, Mask], PartT]) -> list[PartT]:
        """What `work` makes of the columns of each segment, and of which of its rows are alive.

        A damaged file is done without. Raises DataError for a damaged item.
        """
        found = []
        for segment, start in zip(self._segments, self._starts, strict=False):
            alive_N = self._alive_N[start : start + len(segment)]
            columns = columns_of(segment)
            try:
                found.append(work(columns, alive_N))
            except DataError as error:
                found.append(work(TABLE.again(segment, error), alive_N))
        return found

    @property
    def ids(self) -> list[ItemId]:
        """All ids, in order of insertion."""

        def of(columns: Columns, alive_N: Mask) -> list[ItemId]:
            return [
                one
                for stripe in columns.stripes
                for one, is_alive in zip(columns.ids(stripe), _rows(alive_N, stripe).tolist(), strict=True)
                if is_alive
            ]

        return list(itertools.chain.from_iterable(self._parts(of)))

    @property
    def fields(self) -> list[str]:
        """The fields that any item has, in the order in which they come; besides these, conditions may name its id."""
        if self._fields is None:
            first: dict[str, int] = {}  # the first row that has a field
            for start, found in zip(self._starts, self._parts(_first_rows), strict=False):
                for name, row in found.items():
                    first.setdefault(name, start + row)
            order: dict[tuple[int, str], int] = {}
            for position in set(first.values()):
                number = bisect.bisect_right(self._starts, position) - 1
                metadata = self._segments[number].item(position - self._starts[number])[1]
                order |= {(position, name): place for place, name in enumerate(metadata)}
            self._fields = sorted(first, key=lambda name: (first[name], order[first[name], name]))
        return self._fields

    def values(self, field: str) -> list[Any]:
        """The value of each row, N of them; None where a row lacks the field, or is removed."""

        def of(columns: Columns, alive_N: Mask) -> list[Any]:
            found: list[Any] = []
            for stripe in columns.stripes:
                if field in stripe.columns:
                    values = [None, *columns.values(stripe, field)]
                    codes_S = np.where(_rows(alive_N, stripe), columns.codes(stripe, field), 0)
                    found += map(values.__getitem__, codes_S.tolist())
                else:
                    found += [None] * stripe.num_rows
            return found

        return list(itertools.chain.from_iterable(self._parts(of)))

    def mask(self, condition: Condition) -> Mask:
        """Which rows (N,) a condition admits; raises ConfigError for one on a field that no item has."""
        condition.check_fields({*self.fields, *ID_FIELDS} if self._alive_N.any() else ())
        mask_N: Mask = condition.answer(self._of_term) & self._alive_N
        return mask_N

    def _of_term(self, term: Term) -> Mask:
        def of(columns: Columns, alive_N: Mask) -> Mask:
            mask_N: Mask = np.zeros(len(alive_N), dtype=np.bool_)
            for stripe in columns.stripes:
                mask_N[stripe.start : stripe.start + stripe.num_rows] = _admitted(columns, stripe, term)
            return mask_N

        return np.concatenate([np.zeros(0, dtype=np.bool_), *self._parts(of)])


def _rows(alive_N: Mask, stripe: Stripe) -> Mask:
    return alive_N[stripe.start : stripe.start + stripe.num_rows]


def _first_rows(columns: Columns, alive_N: Mask) -> dict[str, int]:
    """The first row that has each field and is alive."""
    found: dict[str, int] = {}
    for stripe in columns.stripes:
        alive_S = _rows(alive_N, stripe)
        for name in stripe.columns.keys() - found.keys() if alive_S.any() else ():
            has_S = (columns.codes(stripe, name) > 0) & alive_S
            if has_S.any():
                found[name] = stripe.start + int(np.argmax(has_S))
    return found


def _admitted(columns: Columns, stripe: Stripe, term: Term) -> Mask:
    """Which rows (S,) of a stripe a term admits: each different value is judged once."""
    if term.field in ID_FIELDS:
        found_S: Mask = np.array(term.admits_each(columns.ids(stripe)), dtype=np.bool_)
    else:
        found_S = np.full(stripe.num_rows, term.admits({}), dtype=np.bool_)
    if term.field in stripe.columns:  # of an `id`, in the rows to which a table gave one of their own
        is_admitted_V = np.array([False, *term.admits_each(columns.values(stripe, term.field))], dtype=np.bool_)
        codes_S = columns.codes(stripe, term.field)
        found_S = np.where(codes_S > 0, is_admitted_V[codes_S], found_S)
    return found_S
