"""Conditions on items, such as `(group=动物 or path~旅行) date>=2021-05`: parsed, never run as code.

The command line and the service take them; `query.ItemTable` answers them by columns, `Condition.admits` for one item.
"""

import functools
import operator
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import numpy as np

from cn_clip import spelling
from cn_clip.errors import ConfigError
from cn_clip.retrieval.segments import ItemId

MAX_LENGTH = 4096
# Of brackets and `not` in each other.
MAX_DEPTH = 32
# What names the id of an item.
ID_FIELDS = ("id", "path")
EXAMPLE = 'such as group=动物 year>=2020 date=2021-05 tag=海,山 name!="a b" (path~旅行 or not id~IMG)'

_COMPARISONS = {"=": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_PLAIN = r"[^\s,\"'=<>!~()（）]"
# A name may hold brackets that close again, as 价格(元) does.
_HEAD = re.compile(rf"\s*({_PLAIN}+(?:[(（]{_PLAIN}*[)）]{_PLAIN}*)*)\s*(>=|<=|!=|!~|=|>|<|~)\s*")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_ENDS_VALUE = frozenset(",\"'=<>!")
_COMMA = re.compile(r"\s*,\s*")
_AND, _OR, _NOT = (re.compile(rf"\s*({words})(?=[\s()（）]|\Z)", re.I) for words in ("and|且", "or|或", "not|非"))
_OPEN, _CLOSE = re.compile(r"\s*[(（]"), re.compile(r"\s*[)）]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# As a user writes a date or its beginning, and as items hold one.
_ASKED_DATE = re.compile(r"(\d{4})(?:[-/](\d\d?)(?:[-/](\d\d?)(?:[T ](\d\d(?::\d\d(?::\d\d)?)?))?)?)?", re.ASCII)
_HELD_DATE = re.compile(r"\d{4}-\d\d(-\d\d([T ]\d\d(:\d\d.*)?)?)?", re.ASCII | re.DOTALL)

AnswerT = TypeVar("AnswerT", bound=Any)


@dataclass(frozen=True)
class Value:
    """What a field is compared with. number, date: what its text reads as, None for a text in quotes; a date of which
    the end is left out means all of that year, month, day, hour or minute."""

    text: str
    number: int | float | None = None
    date: str | None = None

    @classmethod
    def read(cls, text: str) -> "Value":
        """A value that stood without quotes."""
        date, match = None, _ASKED_DATE.fullmatch(text)
        if match:
            day = "-".join(one.zfill(2) for one in match.groups()[:3] if one)
            date = f"{day}T{match[4]}" if match[4] else day
        return cls(text, number_of(text), date)

    def compares(self, found: Any, sign: str) -> bool:
        """Whether `found sign value`: as numbers or dates if both read as these, else as text."""
        if sign == "~":
            is_text = isinstance(found, (str, int, float)) and not isinstance(found, bool)
            return is_text and folded(self.text) in folded(str(found))
        if isinstance(found, bool):
            return sign == "=" and self.text == str(found).lower()
        if self.number is not None and (number := number_of(found)) is not None:
            return bool(_COMPARISONS[sign](number, self.number))
        if self.date is not None and isinstance(found, str) and (held := held_date(found)) is not None:
            return bool(_COMPARISONS[sign](held[: len(self.date)], self.date))
        if sign == "=":
            return str(found) == self.text
        return isinstance(found, str) and bool(_COMPARISONS[sign](found, self.text))

    def compares_each(self, found: Sequence[Any], sign: str) -> list[bool]:
        """`compares` of each, which are texts, numbers and booleans; much faster where all are of one kind."""
        kinds = set(map(type, found))
        if sign == "~" and kinds == {str}:
            # A line end composes with no letter, so that all are folded at once.
            part, lines = folded(self.text), folded("\n".join(found)).split("\n")
            if len(lines) == len(found):
                return [part in line for line in lines]
        elif self.number is not None and kinds and kinds <= {int, float} and sign in _COMPARISONS:
            compares, number = _COMPARISONS[sign], self.number
            return [bool(compares(one, number)) for one in found]
        elif self.date is not None and kinds == {str} and all(map(_HELD_DATE.fullmatch, found)):
            compares, date, length = _COMPARISONS[sign], self.date, len(self.date)
            return [compares(one.replace(" ", "T", 1)[:length], date) for one in found]
        return [self.compares(one, sign) for one in found]


@dataclass(frozen=True)
class Between:
    """The numbers or dates from `low` to `high`, both included."""

    low: Value
    high: Value

    def compares(self, found: Any, sign: str) -> bool:
        """Whether it lies there; sign is always `=`."""
        assert sign == "="
        return self.low.compares(found, ">=") and self.high.compares(found, "<=")

    def compares_each(self, found: Sequence[Any], sign: str) -> list[bool]:
        """`compares` of each."""
        assert sign == "="
        return list(map(operator.and_, self.low.compares_each(found, ">="), self.high.compares_each(found, "<=")))


@dataclass(frozen=True)
class Term:
    """`field operator values`; several values mean one of them (none of them, with != and !~)."""

    field: str
    operator: str
    values: tuple[Value | Between, ...]

    def admits(self, fields: Mapping[str, Any]) -> bool:
        """Whether an item fits. One without the field fits only != and !~; of a list, one element is enough."""
        found = fields.get(self.field)
        candidates = [one for one in (found if isinstance(found, list) else [found]) if one is not None]
        sign = self.operator.removeprefix("!")
        fits = any(value.compares(one, sign) for one in candidates for value in self.values)
        return fits != self.operator.startswith("!")

    def admits_each(self, found: Sequence[Any]) -> list[bool]:
        """`admits` of items whose field has these values."""
        if not set(map(type, found)) <= {str, int, float, bool}:
            return [self.admits({self.field: one}) for one in found]
        sign, is_not = self.operator.removeprefix("!"), self.operator.startswith("!")
        fits = self.values[0].compares_each(found, sign)
        for value in self.values[1:]:
            fits = list(map(operator.or_, fits, value.compares_each(found, sign)))
        return [not one for one in fits] if is_not else fits


@dataclass(frozen=True)
class Not:
    """What does not fit the part."""

    part: "Node"


@dataclass(frozen=True)
class And:
    """What fits every part."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Or:
    """What fits a part."""

    parts: tuple["Node", ...]


Node: TypeAlias = Term | Not | And | Or


@dataclass(frozen=True)
class Condition:
    """A tree of terms."""

    root: Node

    def answer(self, of_term: Callable[[Term], AnswerT]) -> AnswerT:
        """The answers to the terms, joined by `&`, `|`, `~` as the tree says: booleans of numpy, or arrays of them."""

        def joined(node: Node) -> AnswerT:
            if isinstance(node, Term):
                return of_term(node)
            if isinstance(node, Not):
                return ~joined(node.part)  # type: ignore[no-any-return]
            join = operator.and_ if isinstance(node, And) else operator.or_
            answer: AnswerT = functools.reduce(join, map(joined, node.parts))
            return answer

        return joined(self.root)

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms, from left to right."""

        def below(node: Node) -> Iterator[Term]:
            if isinstance(node, Term):
                yield node
            else:
                for part in (node.part,) if isinstance(node, Not) else node.parts:
                    yield from below(part)

        return tuple(below(self.root))

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it names."""
        return frozenset(term.field for term in self.terms)

    def admits(self, item_id: ItemId, metadata: Mapping[str, Any]) -> bool:
        """Whether an item fits."""
        fields = fields_of(item_id, metadata)
        return bool(self.answer(lambda term: np.bool_(term.admits(fields))))

    def check_fields(self, known: Collection[str]) -> None:
        """Raises ConfigError for a field that is none of `known`, those that any item has; without items, for none."""
        for term in self.terms:
            if known and term.field not in known:
                near = spelling.nearest(term.field, known)
                hint = f"did you mean {near!r}? " if near else ""
                raise ConfigError(
                    f"where: no item has the field {term.field!r}; {hint}there are: {', '.join(sorted(known))}"
                )


def fields_of(item_id: ItemId, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What terms name: the metadata, and the id as `path` and, unless a table has a column of that name, as `id`."""
    return {"id": item_id, **metadata, "path": item_id}


def parse_condition(text: str) -> Condition:
    """Terms `field=value`, `!=`, `<`, `<=`, `>`, `>=`, `~` (contains), `!~`; blanks or `and`, `or`, `not`, brackets.

    `not` binds closest, then `and`, then `or`: `not a=1 b=2 or c=3` is `((not a=1) and b=2) or c=3`. `field=a,b` is one
    of both, `field=1..9` and `field=2021-05..2021-08` lie between, ends included. Values are numbers where both sides
    read as numbers, dates where both read as dates (`2021-05` is all of May), else text, ordered by code point; in
    quotes they are text and may hold anything, a backslash before a quote or a backslash. `~` passes over case and
    width of letters. The Chinese words are 且 或 非. Raises ConfigError saying which character leaves the grammar, or
    that the text is longer than 4096 characters or nested deeper than 32.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"where: expected at most {MAX_LENGTH} characters, got {len(text)}")
    if not text.strip():
        raise ConfigError(f"where: is empty; expected a condition {EXAMPLE}")
    return _Parser(text).condition()


class _Parser:
    """Reads a condition from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def condition(self) -> Condition:
        root = self._either()
        if self.text[self.position :].strip():
            self._refuse("expected and, or, another condition or the end")
        return Condition(root)

    def _either(self) -> Node:
        parts = [self._all()]
        while self._takes(_OR):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _all(self) -> Node:
        parts = [self._one()]
        while self._takes(_AND) or not self._is_over():
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _is_over(self) -> bool:
        ends = (_OR, _CLOSE) if _HEAD.match(self.text, self.position) is None else ()
        return not self.text[self.position :].strip() or any(one.match(self.text, self.position) for one in ends)

    def _one(self) -> Node:
        head = _HEAD.match(self.text, self.position)
        if head is not None:
            self.position = head.end()
            return self._term(head[1], head[2])
        start, is_not = self.position, self._takes(_NOT)
        if not is_not and not self._takes(_OPEN):
            self._refuse(f"expected a condition {EXAMPLE}")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.position = start
            self._refuse(f"expected brackets and not in at most {MAX_DEPTH} levels")
        node = Not(self._one()) if is_not else self._either()
        if not is_not and not self._takes(_CLOSE):
            self._refuse("expected and, or, another condition or the closing bracket )")
        self.depth -= 1
        return node

    def _takes(self, token: re.Pattern[str]) -> bool:
        """Passes over a word or bracket, if it is next; `or=1` is a condition on a field of that name."""
        match = token.match(self.text, self.position)
        if match is None or _HEAD.match(self.text, self.position):
            return False
        self.position = match.end()
        return True

    def _term(self, field: str, sign: str) -> Term:
        values = [self._value(sign)]
        while comma := _COMMA.match(self.text, self.position):
            self.position = comma.end()
            if sign not in ("=", "!=", "~", "!~"):
                self._refuse(f"expected one value, for {sign} takes no more")
            values.append(self._value(sign))
        following = self.text[self.position : self.position + 1]
        if following and not following.isspace() and following not in ")）":
            self._refuse(f"expected a blank after the value of {field}; values of other signs stand in quotes")
        return Term(field, sign, tuple(values))

    def _value(self, sign: str) -> Value | Between:
        quoted, start = _QUOTED.match(self.text, self.position), self.position
        if quoted is not None:
            self.position = quoted.end()
            return Value(re.sub(r"\\(.)", r"\1", quoted[0][1:-1], flags=re.DOTALL))
        depth = 0
        for one in self.text[start:]:
            depth += (one in "(（") - (one in ")）")
            if one.isspace() or one in _ENDS_VALUE or depth < 0:
                break
            self.position += 1
        bare = self.text[start : self.position]
        if not bare:
            self._refuse(f"expected a value after {sign}")
        low, dots, high = bare.partition("..")
        ends = (Value.read(low), Value.read(high))
        if dots and sign in ("=", "!=") and all(one.number is not None or one.date for one in ends):
            return Between(*ends)
        return Value.read(bare)

    def _refuse(self, expected: str) -> NoReturn:
        rest = self.text[self.position :].lstrip()
        character = len(self.text) - len(rest) + 1
        found = f"{rest[:20]!r}" if rest else "the end"
        raise ConfigError(f"where: character {character}: {expected}; found {found} in {self.text.strip()[:80]!r}")


def folded(text: str) -> str:
    """Letters of any case and width as one; a Mac writes é in a file name as two characters."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def held_date(text: str) -> str | None:
    """The date that the text of an item reads as, in the form 2021-05-03T14:22:10 or its beginning."""
    return text.replace(" ", "T", 1) if _HELD_DATE.fullmatch(text) else None


def number_of(value: Any) -> int | float | None:
    """What a value of an item, or a word of a condition, reads as."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str) or len(value) > 300 or not _NUMBER.fullmatch(value):
        return None
    return int(value) if value.lstrip("+-").isdecimal() else float(value)
