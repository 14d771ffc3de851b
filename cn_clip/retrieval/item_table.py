"""Ids and metadata of an index by column, made by one reading of its items: answers conditions without parsing."""

# N rows, removed ones included

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from cn_clip.retrieval.engines import Mask
from cn_clip.retrieval.filters import Condition, Term
from cn_clip.retrieval.segments import ItemId


class ItemTable:
    """positions: the row of each id, in order of insertion."""

    def __init__(self, items: Iterable[tuple[int, ItemId, dict[str, Any]]], alive_N: Mask) -> None:
        """items: (row, id, metadata) of the rows that are not removed, `alive_N`; raises what reading them raises."""
        self.positions: dict[ItemId, int] = {}
        self._alive_N = alive_N
        self._columns: dict[str, _Column] = {}
        for row, item_id, metadata in items:
            self.positions[item_id] = row
            for field, value in metadata.items():
                column = self._columns.get(field)
                if column is None:
                    column = self._columns[field] = _Column()
                column.append(row, value)

    def mask(self, condition: Condition) -> Mask:
        """Which rows (N,) a condition admits; raises ConfigError for one on a field that no item has."""
        condition.check_fields(self._columns)
        mask_N: Mask = self._alive_N.copy()
        for term in condition.terms:
            if term.field in self._columns:  # always, unless no item has any field
                mask_N &= self._columns[term.field].mask(term, len(mask_N))
            else:
                mask_N &= term.admits({})
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

    def mask(self, term: Term, num_rows: int) -> Mask:
        admitted = np.array([term.admits({term.field: value}) for value in self._values], dtype=np.bool_)
        mask_N: Mask = np.full(num_rows, term.admits({}), dtype=np.bool_)
        mask_N[np.frombuffer(self._rows, np.int64)] = admitted[np.frombuffer(self._number_of_row, np.int64)]
        return mask_N
