"""What a condition asks, in the language of a server: each row carries its values in a form that servers can compare.

A filter admits every row that the condition admits, and perhaps others: `remote` judges what comes back by
`Condition.admits`. It says what numbers in texts, dates, lists, missing fields, case and width mean here by what the
rows carry, and uses little of the server's language, so that all versions answer alike.
"""

# A row's columns, as JSON. K is the key of a field, see `key_of_field`:
#   {"has": [K, ...], "rough": [K, ...], K: {"t": [...], "n": [low, high], "s": [low, high], "z": [low, high],
#    "g": [...]}, ...}
# has: the fields of the item. rough: those of which the columns do not tell all; ANY stands for every field.
# Of the values of a field, or of the elements of its list: t: digests of their texts; n: least and greatest number;
# s: least and greatest text, without numbers; z: those of texts that are numbers; g: numbers of the pairs of letters.
# What a field has none of is an interval that holds nothing.

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from cn_clip.retrieval.conditions import (
    And,
    Between,
    Condition,
    Node,
    Not,
    Term,
    Value,
    fields_of,
    folded,
    held_date,
    number_of,
)
from cn_clip.retrieval.segments import ItemId

# The field of a row that holds them.
COLUMNS = "columns"
ANY = "*"
# Bytes of JSON of a row; Milvus takes 65536.
LARGEST_COLUMNS = 40_000
LARGEST_FILTER = 60_000
# What is compared of a text, in characters; the pairs of letters of longer texts are not noted.
PREFIX = 24
LONGEST_PAIRED = 400
# Of a condition's values: pairs of one, and numbers that are compared one by one.
MOST_PAIRS = 16
MOST_NUMBERS = 8

_LARGEST = 1e308
# Below it, every integer is a float of its own.
_EXACT = 2**53
_NO_NUMBER, _NO_TEXT = (_LARGEST, -_LARGEST), ("~", "")
_AFTER_ALL = "\U0010ffff"
_DATE_AND_MORE = re.compile(r"\d{4}-\d\d-\d\d.", re.ASCII | re.DOTALL)

Columns: TypeAlias = dict[str, Any]
# What is always or never so needs no words.
_Filter: TypeAlias = str | bool


def key_of_field(field: str) -> str:
    """A name that no server misreads."""
    return hashlib.blake2b(_bytes(field), digest_size=8).hexdigest()


def columns_of(item_id: ItemId, metadata: Mapping[str, Any]) -> Columns:
    """What a row carries of its item."""
    of_field = {key_of_field(field): _of_value(value) for field, value in fields_of(item_id, metadata).items()}
    columns: Columns = {"has": list(of_field), "rough": []}
    size = 0
    for key, (values, is_rough) in sorted(of_field.items(), key=lambda one: len(json.dumps(one[1][0]))):
        size += len(json.dumps(values)) + 2 * len(key) + 16
        if size > LARGEST_COLUMNS - 64:
            if len(of_field) * 160 > LARGEST_COLUMNS // 2:  # even their names would be too much
                return {"has": [], "rough": [ANY]}
            values, is_rough = _summary([], [], [], [], []), True
        columns[key] = values
        if is_rough:
            columns["rough"].append(key)
    if len(json.dumps(columns)) > LARGEST_COLUMNS:
        return {"has": [], "rough": [ANY]}
    return columns


def _of_value(value: Any) -> tuple[Columns, bool]:
    """The columns of a field, and whether they do not tell all of it."""
    texts, numbers, words, digits = list[str](), list[float](), list[str](), list[str]()
    pairs, is_rough = set[int](), False
    for one in value if isinstance(value, list) else [value]:
        if one is None:
            continue
        texts.append(_digest(str(one).lower() if isinstance(one, bool) else str(one)))
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            continue
        number = number_of(one)
        if number is not None and number != number:  # NaN is in no JSON
            is_rough = True
        elif number is not None:
            numbers.append(_float(number))
        if isinstance(one, str):
            (words if number is None else digits).extend({one, held_date(one) or one})
        searched = folded(str(one))
        if len(searched) > LONGEST_PAIRED:
            is_rough = True
        else:
            pairs |= set(_pairs(searched))
    return _summary(sorted(set(texts)), numbers, words, digits, sorted(pairs)), is_rough


def _summary(
    texts: list[str], numbers: Sequence[float], words: Sequence[str], digits: Sequence[str], pairs: list[int]
) -> Columns:
    return {
        "t": texts,
        "n": [min(numbers), max(numbers)] if numbers else list(_NO_NUMBER),
        "s": [_ordered(min(words)), _ordered(max(words))] if words else list(_NO_TEXT),
        "z": [_ordered(min(digits)), _ordered(max(digits))] if digits else list(_NO_TEXT),
        "g": pairs,
    }


def _pairs(text: str) -> Iterable[int]:
    """Numbers of the letters of a text and of two that follow each other; different ones may share a number."""
    for start in range(len(text)):
        yield zlib.crc32(_bytes(text[start : start + 1])) & 0xFFFF
        if start:
            yield zlib.crc32(_bytes(text[start - 1 : start + 1])) & 0xFFFF


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(text: str) -> str:
    return hashlib.blake2b(_bytes(text), digest_size=12).hexdigest()


def _ordered(text: str) -> str:
    """The beginning of a text in letters that need no escape, in the order of code points: half a byte each."""
    return "".join(chr(65 + (one >> 4)) + chr(97 + (one & 15)) for one in _bytes(text[:PREFIX]))


def _float(number: float) -> float:
    """The nearest float in the range that JSON and servers hold; greater numbers give no lesser ones."""
    try:
        return min(max(float(number), -_LARGEST), _LARGEST)
    except OverflowError:
        return _LARGEST if number > 0 else -_LARGEST


class Language(Protocol):
    """How a server is asked about the columns of a row; what is compared with a column that is missing is not true.

    `and`, `or`, `not` and brackets are the same in all. Keys and digests are hexadecimal, texts letters from a to p.
    """

    def has(self, key: str) -> str:
        """Whether the item has the field."""

    def is_rough(self, keys: Sequence[str]) -> str:
        """Whether the columns do not tell all of one of these."""

    def holds_text(self, key: str, digests: Sequence[str]) -> str:
        """Whether one of the texts is among these."""

    def holds_pairs(self, key: str, pairs: Sequence[int]) -> str:
        """Whether all of these are among the pairs of letters."""

    def bound(self, key: str, kind: str, end: int, sign: str, value: float | str) -> str:
        """How the least (0) or greatest (1) number or text compares with a value."""


def filter_of(condition: Condition, language: Language) -> str | None:
    """What to ask a server for; None where all rows, or what would be too long, would be asked for."""
    asked = _Asked(language).of_node(condition.root, is_sure=False)
    return asked if isinstance(asked, str) and len(asked) <= LARGEST_FILTER else None


def without_fields(language: Language) -> str:
    """Rows whose fields are not noted, since they are so many."""
    return language.is_rough([ANY])


def filter_of_field(field: str, language: Language) -> str:
    """Rows of the items that have a field, and those of which it is not known."""
    return f"({language.has(key_of_field(field))} or {without_fields(language)})"


def _joined(word: str, parts: Iterable[_Filter]) -> _Filter:
    decides = word == "or"
    left = list[str]()
    for one in parts:
        if isinstance(one, str):
            left.append(one)
        elif one is decides:
            return decides
    if not left:
        return not decides
    return left[0] if len(left) == 1 else "(" + f" {word} ".join(left) + ")"


def _negated(part: _Filter) -> _Filter:
    return f"(not {part})" if isinstance(part, str) else not part


class _Asked:
    """The parts of a filter."""

    def __init__(self, language: Language) -> None:
        self.to = language

    def of_node(self, node: Node, *, is_sure: bool) -> _Filter:
        """is_sure: admits only what the node admits, and perhaps not all of it; else all of that, and perhaps more.

        What is turned round by a `not` must be sure where the rest need not be, and the other way round.
        """
        if isinstance(node, Term):
            is_not = node.operator.startswith("!")
            told = self.term(node, is_sure=is_sure != is_not)
            return _negated(told) if is_not else told
        if isinstance(node, Not):
            return _negated(self.of_node(node.part, is_sure=not is_sure))
        return _joined(
            "and" if isinstance(node, And) else "or", [self.of_node(part, is_sure=is_sure) for part in node.parts]
        )

    def term(self, term: Term, *, is_sure: bool) -> _Filter:
        """What fits one of the values, the sign before the operator left out."""
        sign, key = term.operator.removeprefix("!"), key_of_field(term.field)
        if sign == "~":
            parts = [
                False if is_sure else self.contains(key, value) for value in term.values if isinstance(value, Value)
            ]
        else:
            parts = self.of_values(key, sign, term.values, is_sure=is_sure)
        told = _joined("or", parts)
        if is_sure:  # a server may call a comparison of what is missing neither true nor false
            return _joined("and", [self.to.has(key), told])
        return _joined("or", [told, self.to.is_rough([key, ANY])])

    def contains(self, key: str, value: Value) -> _Filter:
        numbers = sorted(dict.fromkeys(_pairs(folded(value.text))))[:MOST_PAIRS]
        return self.to.holds_pairs(key, numbers) if numbers else self.to.has(key)

    def of_values(self, key: str, sign: str, values: Sequence[Value | Between], *, is_sure: bool) -> list[_Filter]:
        """For each of the values, or several of them together."""
        parts, equal = list[_Filter](), [one for one in values if isinstance(one, Value)]
        for one in values:
            if isinstance(one, Between):
                parts.append(self.between(key, one, is_sure=is_sure))
        if sign != "=":
            return [*parts, *(self.compared(key, sign, one, is_sure=is_sure) for one in equal)]
        if equal:
            parts.append(self.to.holds_text(key, [_digest(one.text) for one in equal]))
        numbers = sorted(_float(one.number) for one in equal if one.number is not None)
        if is_sure:
            exact = [one for one in numbers[:MOST_NUMBERS] if abs(one) < _EXACT]
            parts += [f"({self.to.bound(key, 'n', end, '==', one)})" for one in exact for end in (0, 1)]
            return parts
        if len(numbers) > MOST_NUMBERS:
            numbers = [numbers[0], numbers[-1]]
            parts.append(self.holding(key, numbers[0], numbers[1]))
        else:
            parts += [self.holding(key, one, one) for one in numbers]
        for one in equal:
            if one.date is not None:
                parts.append(
                    _joined(
                        "and", [self.texts(key, "s", ">=", one.date), self.texts(key, "s", "<=", one.date + _AFTER_ALL)]
                    )
                )
        return parts

    def holding(self, key: str, low: float, high: float) -> str:
        """Whether the numbers of a row may lie there."""
        return f"({self.to.bound(key, 'n', 0, '<=', high)} and {self.to.bound(key, 'n', 1, '>=', low)})"

    def texts(self, key: str, kind: str, sign: str, text: str) -> str:
        """Whether the least text is at most, or the greatest at least, so; longer ones by their beginnings."""
        return f"({self.to.bound(key, kind, 1 if sign == '>=' else 0, sign, _ordered(text))})"

    def between(self, key: str, value: Between, *, is_sure: bool) -> _Filter:
        if not is_sure:
            ends = ((">=", value.low), ("<=", value.high))
            return _joined("and", [self.compared(key, sign, end, is_sure=False) for sign, end in ends])
        low, high = value.low.number, value.high.number
        if low is None or high is None or max(abs(low), abs(high)) >= _EXACT:
            return False
        return _joined(
            "or",
            [
                f"({self.to.bound(key, 'n', end, '>=', _float(low))} and "
                f"{self.to.bound(key, 'n', end, '<=', _float(high))})"
                for end in (0, 1)
            ],
        )

    def compared(self, key: str, sign: str, value: Value, *, is_sure: bool) -> _Filter:
        """sign: of an order."""
        parts, is_greater = list[_Filter](), sign.startswith(">")
        end = 1 if is_greater else 0
        if value.number is not None:
            number = _float(value.number)
            if not is_sure:
                parts.append(f"({self.to.bound(key, 'n', end, sign[0] + '=', number)})")
            elif abs(number) < _EXACT:
                parts.append(f"({self.to.bound(key, 'n', end, sign, number)})")
        # A date is compared by its beginning, any other text as a whole; which of both a row holds is not known here.
        asked = [value.text] if value.date is None else [value.text, value.date]
        ends = [value.text] if value.date is None else [value.text, value.date + _AFTER_ALL]
        if not is_sure:
            parts.append(
                self.texts(key, "s", ">=", min(asked)) if is_greater else self.texts(key, "s", "<=", max(ends))
            )
            if value.number is None:
                parts.append(self.texts(key, "z", sign[0] + "=", value.text))
            return _joined("or", parts)
        if any(_DATE_AND_MORE.match(one) for one in asked):
            return _joined("or", parts)
        text = max(ends) if is_greater else min(asked)
        parts.append(f"({self.to.bound(key, 's', end, sign[0], _ordered(text))})")
        if value.number is None:
            parts.append(f"({self.to.bound(key, 'z', end, sign[0], _ordered(value.text))})")
        return _joined("or", parts)
