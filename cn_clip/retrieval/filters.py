"""Conditions on metadata, such as `group=动物 year>=2020`: parsed, never run as code; `store` searches with them."""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from cn_clip.errors import ConfigError

MAX_LENGTH = 4096
GRAMMAR = 'expected terms such as group=动物 year>=2020 tag=海,山 name!="a b"'

Ordering: TypeAlias = Callable[[Any, Any], bool]

_ORDERINGS: dict[str, Ordering] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_QUOTED = r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'"
_VALUE = rf"{_QUOTED}|[^\s,\"'=<>!]+"
_TERM = re.compile(rf"\s*([^\s,\"'=<>!]+)\s*(>=|<=|!=|=|>|<)\s*((?:{_VALUE})(?:\s*,\s*(?:{_VALUE}))*)(?=\s|\Z)")
_EACH_VALUE = re.compile(_VALUE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


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
        """Whether an item fits. One without the field fits `!=` alone; of a list, one element is enough."""
        found = metadata.get(self.field)
        candidates = [one for one in (found if isinstance(found, list) else [found]) if one is not None]
        if self.operator in ("=", "!="):
            is_among = any(_equal(one, value) for one in candidates for value in self.values)
            return is_among == (self.operator == "=")
        compare = _ORDERINGS[self.operator]
        return any(_compared(compare, one, self.values[0]) for one in candidates)


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


def parse(text: str) -> Condition:
    """Terms joined by blanks, all of which must hold: `field=value`, `!=`, `<`, `<=`, `>`, `>=`; `field=a,b` is one of.

    Values are numbers where both sides read as numbers, else text, ordered by code point (dates written year first
    come out right); in quotes they are text and may hold blanks and commas, a backslash before a quote or a backslash.
    Raises ConfigError saying where the text leaves the grammar, or that it is longer than 4096 characters.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"where: expected at most {MAX_LENGTH} characters, got {len(text)}")
    terms, place = [], 0
    while text[place:].strip():
        match = _TERM.match(text, place)
        if match is None:
            raise ConfigError(f"where: {text[place:].strip()[:40]!r} is no condition; {GRAMMAR}")
        field, sign, values = match[1], match[2], tuple(map(_unquoted, _EACH_VALUE.findall(match[3])))
        if sign in _ORDERINGS and len(values) > 1:
            raise ConfigError(f"where: {match[0].strip()!r}: {sign} takes one value; {GRAMMAR}")
        terms.append(Term(field, sign, values))
        place = match.end()
    if not terms:
        raise ConfigError(f"where: is empty; {GRAMMAR}")
    return Condition(tuple(terms))


def _unquoted(value: str) -> str:
    return Quoted(re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)) if value[0] in "\"'" else value


def _equal(found: Any, value: str) -> bool:
    if isinstance(found, bool):
        return value == str(found).lower()
    number, wanted = _number(found), _number(value)
    return number == wanted if number is not None and wanted is not None else str(found) == value


def _compared(compare: Ordering, found: Any, value: str) -> bool:
    if isinstance(found, (bool, dict, list)):
        return False
    number, wanted = _number(found), _number(value)
    if number is not None and wanted is not None:
        return compare(number, wanted)
    return isinstance(found, str) and compare(found, value)


def _number(value: Any) -> int | float | None:
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str) or isinstance(value, Quoted) or len(value) > 300 or not _NUMBER.fullmatch(value):
        return None
    return int(value) if value.lstrip("+-").isdecimal() else float(value)
