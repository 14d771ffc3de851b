"""What an index is asked: the vector of several parts, and conditions on metadata such as `group=动物 year>=2020`.

The command line and the service search with both. A condition is parsed, never run as code, and answered by columns of
the metadata, which are made by one reading of the items.
"""

# N rows, removed ones included, P parts, D dimensions

import operator
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cn_clip.errors import ConfigError
from cn_clip.retrieval.engines import Mask
from cn_clip.retrieval.segments import FloatArray, ItemId

# Below this length the parts have cancelled each other out: what is left is rounding.
SHORTEST = 1e-4
MAX_LENGTH = 4096
GRAMMAR = 'expected terms such as group=动物 year>=2020 tag=海,山 name!="a b"'

_COMPARISONS = {"=": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_QUOTED = r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'"
_VALUE = rf"{_QUOTED}|[^\s,\"'=<>!]+"
_TERM = re.compile(rf"\s*([^\s,\"'=<>!]+)\s*(>=|<=|!=|=|>|<)\s*((?:{_VALUE})(?:\s*,\s*(?:{_VALUE}))*)(?=\s|\Z)")
_EACH_VALUE = re.compile(_VALUE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


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


class Quoted(str):
    """A value that stood in quotes: text, also where it reads as a number."""

    __slots__ = ()


@dataclass(frozen=True)
class Term:
    """`field operator values`; several values mean one of them (none of them, with !=)."""

    field: str
    operator: str
    values: tuple[str, ...]

    def admits(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item fits. One without the field fits only `!=`; of a list, one element is enough."""
        found = metadata.get(self.field)
        candidates = [one for one in (found if isinstance(found, list) else [found]) if one is not None]
        if self.operator == "!=":
            return not any(_holds(one, "=", value) for one in candidates for value in self.values)
        return any(_holds(one, self.operator, value) for one in candidates for value in self.values)


@dataclass(frozen=True)
class Condition:
    """All of the terms."""

    terms: tuple[Term, ...]

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it names."""
        return frozenset(term.field for term in self.terms)

    def admits(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item fits."""
        return all(term.admits(metadata) for term in self.terms)

    def check_fields(self, known: Collection[str]) -> None:
        """Raises ConfigError for a field that is none of `known`, those that any item has; without items, for none."""
        for term in self.terms:
            if known and term.field not in known:
                raise ConfigError(f"where: no item has the field {term.field!r}; there are: {', '.join(sorted(known))}")


def parse_condition(text: str) -> Condition:
    """Terms joined by blanks, all of which must hold: `field=value`, `!=`, `<`, `<=`, `>`, `>=`; `field=a,b` is one of.

    Values are numbers where both sides read as numbers, else text, ordered by code point (dates written year first
    come out right); in quotes they are text and may hold blanks and commas, a backslash before a quote or a backslash.
    Raises ConfigError saying where the text leaves the grammar, or that it is longer than 4096 characters.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"where: expected at most {MAX_LENGTH} characters, got {len(text)}")
    terms, position = [], 0
    while text[position:].strip():
        match = _TERM.match(text, position)
        if match is None:
            raise ConfigError(f"where: {text[position:].strip()[:40]!r} is no condition; {GRAMMAR}")
        values = tuple(
            Quoted(re.sub(r"\\(.)", r"\1", one[1:-1], flags=re.DOTALL)) if one[0] in "\"'" else one
            for one in _EACH_VALUE.findall(match[3])
        )
        if match[2] not in ("=", "!=") and len(values) > 1:
            raise ConfigError(f"where: {match[0].strip()!r}: {match[2]} takes one value; {GRAMMAR}")
        terms.append(Term(match[1], match[2], values))
        position = match.end()
    if not terms:
        raise ConfigError(f"where: is empty; {GRAMMAR}")
    return Condition(tuple(terms))


def _holds(found: Any, sign: str, value: str) -> bool:
    """Whether `found sign value`: as numbers if both read as numbers, else as text."""
    if isinstance(found, bool):
        return sign == "=" and value == str(found).lower()
    number, wanted = _number(found), _number(value)
    if number is not None and wanted is not None:
        return bool(_COMPARISONS[sign](number, wanted))
    if sign == "=":
        return str(found) == value
    return isinstance(found, str) and bool(_COMPARISONS[sign](found, value))


def _number(value: Any) -> int | float | None:
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str) or isinstance(value, Quoted) or len(value) > 300 or not _NUMBER.fullmatch(value):
        return None
    return int(value) if value.lstrip("+-").isdecimal() else float(value)


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
                column = self._columns.get(field)
                if column is None:
                    column = self._columns[field] = _Column()
                column.append(row, value)

    @property
    def fields(self) -> list[str]:
        """The fields that any item has."""
        return list(self._columns)

    def values(self, field: str) -> list[Any]:
        """The value of each row, N of them; None where a row lacks the field."""
        column, found = self._columns.get(field), list[Any]([None]) * len(self._alive_N)
        for row, value in column.items() if column is not None else ():
            found[row] = value
        return found

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

    def items(self) -> Iterator[tuple[int, Any]]:
        """(row, value) of the rows that have the field."""
        for row, number in zip(self._rows, self._number_of_row, strict=True):
            yield row, self._values[number]

    def mask(self, term: Term, num_rows: int) -> Mask:
        admitted = np.array([term.admits({term.field: value}) for value in self._values], dtype=np.bool_)
        mask_N: Mask = np.full(num_rows, term.admits({}), dtype=np.bool_)
        mask_N[np.frombuffer(self._rows, np.int64)] = admitted[np.frombuffer(self._number_of_row, np.int64)]
        return mask_N
