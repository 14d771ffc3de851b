"""Bounds of options and rules between options, both as data; `__post_init__` of an Options class calls `check`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_type_hints

from cn_clip.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The numbers an option may be, written in its annotation: `lr: Annotated[float, Range(above=0)]`.

    NaN and infinity are in no range.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`at least 1`, `3 to 512`, `a value in [0, 1)`."""
        low, high = self.least, self.most
        if low is not None and high is not None:
            return f"{low} to {high}"
        if low is not None and self.below is not None:
            return f"a value in [{low}, {self.below})"
        words = {"at least": low, "at most": high, "more than": self.above, "less than": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


class Rule(NamedTuple):
    """What settings must not be. The first of `names` is the option at fault; `message` names the flags of all."""

    names: tuple[str, ...]
    is_broken: Callable[[Any], bool]
    message: str
    is_refused: bool


def flag(name: str) -> str:
    """`lora_rank` as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def flag_of(name: str, annotations: Iterable[Any]) -> str:
    """The flag of a field of an Options class, which its annotations may call by another name."""
    return flag(next((one.name for one in annotations if getattr(one, "name", None)), name))


def is_given(options: Any, name: str) -> bool:
    """Whether an option differs from its default."""
    default = next(field.default for field in fields(type(options)) if field.name == name)
    return bool(getattr(options, name) != default)


def needs(name: str, other: str, why: str = "", *, refused: bool) -> Rule:
    """`name` does nothing when `other` is not given."""
    text = f"needs {flag(other)}" if refused else f"changes nothing without {flag(other)}"
    return _of_two(name, other, f"{flag(name)}: {text}{why}", refused, lambda given: not given)


def excludes(name: str, other: str, why: str, *, refused: bool) -> Rule:
    """`name` and `other` may not be given together."""
    return _of_two(name, other, f"{flag(name)} and {flag(other)}: {why}", refused, bool)


def _of_two(name: str, other: str, message: str, refused: bool, broken_by: Callable[[bool], bool]) -> Rule:
    return Rule(
        (name, other),
        lambda options: is_given(options, name) and broken_by(is_given(options, other)),
        message,
        refused,
    )


def broken(options: Any, rules: Iterable[Rule]) -> list[Rule]:
    """The rules that these settings break, in the order of `rules`."""
    return [rule for rule in rules if rule.is_broken(options)]


def check(options: Any, rules: Iterable[Rule] = ()) -> None:
    """Raises ConfigError for the first number outside its range, then for the first rule that refuses."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, annotations = getattr(options, name), getattr(hint, "__metadata__", ())
        for bounds in annotations:
            if isinstance(bounds, Range) and value is not None and value not in bounds:
                raise ConfigError(f"{flag_of(name, annotations)}: expected {bounds}, got {value}")
    for rule in broken(options, rules):
        if rule.is_refused:
            raise ConfigError(rule.message)
