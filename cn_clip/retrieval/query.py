"""What an index is asked: the vector of several parts, and which items fit a condition (see `conditions`).

The command line and the service search with both. A condition is answered by columns of the metadata, which are made by
one reading of the items.
"""

# N rows, removed ones included, I items, R rows that have a field, P parts, D dimensions

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cn_clip.errors import ConfigError
from cn_clip.retrieval.conditions import ID_FIELDS, Condition, Term
from cn_clip.retrieval.engines import Mask
from cn_clip.retrieval.segments import FloatArray, IntArray, ItemId

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
    """Ids and metadata of an index by column. positions: the row of each id, in order of insertion."""

    def __init__(self, items: Iterable[tuple[int, ItemId, dict[str, Any]]], alive_N: Mask) -> None:
        """items: (row, id, metadata) of the rows that are not removed, `alive_N`; raises what reading them raises."""
        self.positions: dict[ItemId, int] = {}
        self._alive_N = alive_N
        self._columns: dict[str, _Column] = {}
        for row, item_id, metadata in items:
            self.positions[item_id] = row
            for field, value in metadata.items():
                if field != "path":  # the id goes by that name
                    self._columns.setdefault(field, _Column()).append(row, value)

    @property
    def fields(self) -> list[str]:
        """The fields that any item has; besides these, conditions may name its id."""
        return list(self._columns)

    def values(self, field: str) -> list[Any]:
        """The value of each row, N of them; None where a row lacks the field."""
        column, found = self._columns.get(field), list[Any]([None]) * len(self._alive_N)
        for row, value in column.items() if column is not None else ():
            found[row] = value
        return found

    def mask(self, condition: Condition) -> Mask:
        """Which rows (N,) a condition admits; raises ConfigError for one on a field that no item has."""
        condition.check_fields({*self._columns, *ID_FIELDS} if self.positions else ())
        mask_N: Mask = condition.answer(self._of_term) & self._alive_N
        return mask_N

    def _of_term(self, term: Term) -> Mask:
        column, num_rows = self._columns.get(term.field), len(self._alive_N)
        if term.field not in ID_FIELDS:  # only an index without items has no such column
            return (column or _Column()).mask(term, num_rows)
        mask_N: Mask = np.zeros(num_rows, dtype=np.bool_)
        rows_I = np.fromiter(self.positions.values(), np.int64)
        mask_N[rows_I] = [term.admits({term.field: item_id}) for item_id in self.positions]
        if column is not None:  # a table gave some items an `id` of their own
            mask_N[column.rows] = column.mask(term, num_rows)[column.rows]
        return mask_N


class _Column:
    """The values of a field: each different one once, and which of them a row has; other rows lack the field."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._numbers: dict[object, int] = {}
        self._rows, self._number_of_row = array("q"), array("q")

    def append(self, row: int, value: Any) -> None:
        # 1, 1.0 and true are different values to a condition; lists and objects have no hash.
        key = value if isinstance(value, str) else (type(value), repr(value))
        number = self._numbers.setdefault(key, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        self._rows.append(row)
        self._number_of_row.append(number)

    def items(self) -> Iterator[tuple[int, Any]]:
        """(row, value) of the rows that have the field."""
        for row, number in zip(self._rows, self._number_of_row, strict=True):
            yield row, self._values[number]

    @property
    def rows(self) -> IntArray:
        """The rows (R,) that have the field."""
        return np.frombuffer(self._rows, np.int64)

    def mask(self, term: Term, num_rows: int) -> Mask:
        admitted = np.array([term.admits({term.field: value}) for value in self._values], dtype=np.bool_)
        mask_N: Mask = np.full(num_rows, term.admits({}), dtype=np.bool_)
        mask_N[self.rows] = admitted[np.frombuffer(self._number_of_row, np.int64)]
        return mask_N
