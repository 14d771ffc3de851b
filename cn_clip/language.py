"""The reader's language: which one it is, and the Chinese of the English sentences that programs read.

What a command prints for people is written in both languages where it is printed: `both("3 张图片", "3 images")`.
Errors and the help of options are English in the code; the command translates them at its edge (`translated`), by the
catalogue `locales/zh/`, one JSON file a room. `{}` in an English sentence is a value, and `{0}`, `{1}` in the Chinese
are the values in the order of the English:

    "{}: expected {} columns, got {}": "{0}：应为 {1} 列，实际为 {2} 列"
"""

import functools
import json
import os
import plistlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from cn_clip.errors import ConfigError

Language: TypeAlias = Literal["zh", "en"]

CHOICE = "CN_CLIP_LANG"
# As in every program: the first that is set decides.
LOCALES = ("LC_ALL", "LC_MESSAGES", "LANG")
CATALOGUE = Path(__file__).parent / "locales" / "zh"
# Sentences stand in sentences: a reason in an error, a list of options in an advice.
_DEEPEST = 6
# Characters of what is still looked up: messages of other packages may hold whole files.
_LONGEST = 4000
# A sentence with less text of its own, in characters, fits too much.
_TELLING = 12
_NUMBER = re.compile(r"\{(\d+)\}")


def language() -> Language:
    """The language in which people are told things: CN_CLIP_LANG, else that of the locale, else English.

    Where no locale is set, as on Windows, the language of the system's windows counts. English if standard output or
    standard error cannot write Chinese. Raises ConfigError if CN_CLIP_LANG is another language.
    """
    chosen = os.environ.get(CHOICE, "")
    if chosen not in ("", "zh", "en"):
        raise ConfigError(f"{CHOICE}: expected zh or en, got {chosen!r}")
    is_chinese = chosen == "zh" if chosen else _of_system().startswith("zh")
    return "zh" if is_chinese and _writes_chinese() else "en"


def both(in_chinese: str, in_english: str) -> str:
    """The one of two sentences that is in the reader's language."""
    return in_chinese if language() == "zh" else in_english


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun in English: `1 picture`, `1,610 pictures`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _of_system() -> str:
    """The locale's name, or the name of the system's language; "" if neither is known."""
    for name in LOCALES:
        if os.environ.get(name):
            return os.environ[name]
    return _of_windows_or_macos()


@functools.cache
def _of_windows_or_macos() -> str:
    """What people chose in the settings of the system."""
    if sys.platform == "win32":
        import ctypes

        primary = ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF
        return "zh" if primary == 0x04 else ""  # LANG_CHINESE
    if sys.platform == "darwin":
        try:
            with (Path.home() / "Library/Preferences/.GlobalPreferences.plist").open("rb") as file:
                return str(plistlib.load(file)["AppleLanguages"][0])
        except (OSError, ValueError, LookupError, plistlib.InvalidFileException):
            return ""
    return ""


def _writes_chinese() -> bool:
    for stream in (sys.stdout, sys.stderr):
        try:
            "中：".encode(getattr(stream, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return False
    return True


class Template(NamedTuple):
    """An English sentence of the catalogue, cut at its values, and its Chinese."""

    literals: tuple[str, ...]
    chinese: str


def cut(sentence: str) -> tuple[str, ...]:
    """The texts between the values of an English sentence of the catalogue: one more than it has values."""
    return tuple(sentence.split("{}"))


def values_of(literals: tuple[str, ...], text: str) -> list[str] | None:
    """What stands at the values if `text` is this sentence, else None; each value as short as can be.

    values_of(("expected ", " columns"), "expected 3 columns") == ["3"]. In time linear in `text`: as in a file name
    with `*`, the first place of each literal is right if any is.
    """
    first, last = literals[0], literals[-1]
    if len(literals) == 1:
        return [] if text == first else None
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return None
    found: list[str] = []
    start, end, num_together = len(first), len(text) - len(last), 1
    for literal in literals[1:-1]:
        if not literal:
            num_together += 1
            continue
        place = text.find(literal, start, end)
        if place < 0:
            return None
        found += _apart(text[start:place], num_together)
        start, num_together = place + len(literal), 1
    return [*found, *_apart(text[start:end], num_together)]


def _apart(text: str, number: int) -> list[str]:
    """Values with nothing between them: the second is what is proposed, if anything is, else nothing."""
    place = text.find("; did you mean ") if number > 1 else -1
    parts = [text] if place < 0 else [text[:place], text[place:]]
    return parts + [""] * (number - len(parts))


@functools.cache
def templates() -> tuple[Template, ...]:
    """The whole catalogue; sentences with more text of their own come first."""
    found = [Template(cut(english), chinese) for english, chinese in catalogue().items()]
    return tuple(sorted(found, key=lambda one: -sum(map(len, one.literals))))


def catalogue(*, but: str = "") -> dict[str, str]:
    """English sentence -> Chinese, of all rooms, or of all but one."""
    found: dict[str, str] = {}
    for path in sorted(CATALOGUE.glob("*.json")):
        if path.stem != but:
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def translated(text: str) -> str:
    """An English sentence in the reader's language; as it is if the catalogue lacks it.

    Of several sentences of the catalogue that fit, the one with the longest text of its own counts. Values are
    translated if each is a sentence of the catalogue as a whole. What no sentence fits is translated before
    " (REASON)", behind "WHERE: ", or in its parts between "; " if the catalogue has them all.
    """
    return text if language() == "en" else chinese(text) or text


def chinese(text: str) -> str | None:
    """The Chinese of an English sentence, or None if the catalogue lacks it."""
    return _chinese(text, _DEEPEST)


def _chinese(text: str, depth: int) -> str | None:
    return next(_candidates(text, depth), None) if depth and 0 < len(text) <= _LONGEST else None


def _candidates(text: str, depth: int) -> Iterator[str]:
    for template in templates():
        values = values_of(template.literals, text)
        if values is not None:
            told = [_chinese(value, depth - 1) or _advised(value, depth - 1) for value in values]
            # Of "{}, got {}" the values may be anything: then a sentence among them must be known, too.
            if sum(map(len, template.literals)) >= _TELLING or all(map(_is_told, values, told)):
                yield filled(template.chinese, [one or value for one, value in zip(told, values, strict=True)])
    if text.endswith(")") and (bracket := text.find(" (")) > 0 and (before := _chinese(text[:bracket], depth - 1)):
        reason = text[bracket + 2 : -1]
        yield f"{before}（{_chinese(reason, depth - 1) or reason}）"
    parts = text.split("; ")
    if len(parts) > 1:
        all_told = [_chinese(part, depth - 1) for part in parts]
        if all(all_told):
            yield "；".join(map(str, all_told))
    where, colon, what = text.partition(": ")
    if colon and (told_what := _chinese(what, depth - 1)):
        yield f"{where}: {told_what}"


def _is_told(value: str, in_chinese: str | None) -> bool:
    """Whether a value is no sentence, or one that the catalogue has."""
    return in_chinese is not None or len(re.findall(r"(?<![\w/-])[a-z]+(?![\w/])", value)) < 3


def _advised(value: str, depth: int) -> str | None:
    """A value with the Chinese of the advice at its end, as in "RN50, ViT-B-16; did you mean 'RN50'?"; or None."""
    end = value.rfind("; ")
    advice = _chinese(value[end:], depth) if end > 0 else None
    return advice and value[:end] + advice


def filled(in_chinese: str, values: list[str]) -> str:
    """The Chinese of a sentence with its values."""
    return _NUMBER.sub(lambda found: values[int(found[1])], in_chinese)


def numbers(in_chinese: str) -> list[int]:
    """The values that the Chinese of a sentence names."""
    return [int(one) for one in _NUMBER.findall(in_chinese)]
