"""Why files of a source are not in the index: the reasons, in the order in which they are told, and their counts."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cn_clip import extras
from cn_clip.language import both
from cn_clip.retrieval.segments import ItemId

DAMAGED, EMPTY, UNREADABLE, SPECIAL = "damaged", "empty", "unreadable", "special"
NO_PICTURES, TOO_LONG = "no_pictures", "too_long"
SMALL, EXCLUDED, LIVE, VIDEO, OTHER = "small", "excluded", "live", "video", "other"
# Of what a format needs that is not installed, the words go on with the name of the extra.
WITHOUT = "without "
# What people are told, in Chinese and in English; failures before what is passed over on purpose.
_WORDS = {
    DAMAGED: ("不能解码", "not decoded"),
    EMPTY: ("空文件", "empty"),
    WITHOUT: ("缺 {0}", "without {0}"),
    UNREADABLE: ("现在读不了", "cannot be read now"),
    SPECIAL: ("不是普通文件", "not regular files"),
    NO_PICTURES: ("没有画面的视频", "videos without images"),
    TOO_LONG: ("太长、只收录开头的视频", "videos indexed only in part, being too long"),
    SMALL: ("小于 --min-size", "below --min-size"),
    EXCLUDED: ("已排除", "excluded"),
    LIVE: ("实况照片的视频", "videos of Live Photos"),
    VIDEO: ("视频", "videos"),
    OTHER: ("其他文件", "other files"),
}
_ORDER = list(_WORDS)
# These are as they should be: counted, but not named one by one.
_EXPECTED = (SMALL, EXCLUDED, LIVE, VIDEO, OTHER)


@dataclass(frozen=True)
class Skipped:
    """A picture that was not indexed, and why.

    kind: one of the constants above. is_gone: it does not exist; else it or its folder cannot be read now.
    is_remembered: found out by a run before; the file is as it was, and was not read again. side: the shorter one in
    pixels, of a picture that is too small.
    """

    id: ItemId
    reason: str
    kind: str
    is_gone: bool = True
    is_remembered: bool = False
    side: int | None = None

    @property
    def is_failure(self) -> bool:
        """Whether somebody may want to do something about it."""
        return self.kind not in _EXPECTED

    def as_dict(self) -> dict[str, ItemId]:
        """For --json."""
        return {"id": self.id, "reason": self.reason, "kind": self.kind}


def too_small(item_id: ItemId, facts: Mapping[str, Any], min_size: int) -> Skipped | None:
    """Why a picture of these `width` and `height` is not indexed; None where it is not too small."""
    side = min(facts.get("width", min_size), facts.get("height", min_size))
    if side >= min_size:
        return None
    return Skipped(item_id, f"its shorter side has {side} pixels, --min-size asks for {min_size}", SMALL, side=side)


def kind_of(error: Exception, *, num_bytes: int) -> str:
    """Of a picture of so many bytes that was not decoded."""
    # By the words: errors come from a process of its own, which hands on nothing else.
    if missing := extras.recommended(str(error)):
        return WITHOUT + missing
    return DAMAGED if num_bytes else EMPTY


def counts(skipped: Iterable[Skipped]) -> dict[str, int]:
    """How many for which reason, failures first."""
    found = Counter(one.kind for one in skipped)
    return {kind: found[kind] for kind in sorted(found, key=_position)}


def num_remembered(skipped: Iterable[Skipped]) -> int:
    """How many were not read again."""
    return sum(one.is_remembered for one in skipped)


def in_order(skipped: Iterable[Skipped]) -> list[Skipped]:
    """The failures, kind by kind."""
    return sorted((one for one in skipped if one.is_failure), key=lambda one: _position(one.kind))


def told(skipped: Iterable[Skipped]) -> str:
    """`3 not decoded, 40 other files`; "" for none."""
    return both("，", ", ").join(f"{count} {_words(kind)}" for kind, count in counts(skipped).items())


def _position(kind: str) -> tuple[int, str]:
    return _ORDER.index(WITHOUT if kind.startswith(WITHOUT) else kind), kind


def _words(kind: str) -> str:
    if kind.startswith(WITHOUT):
        return both(*_WORDS[WITHOUT]).format(kind.removeprefix(WITHOUT))
    return both(*_WORDS[kind])
