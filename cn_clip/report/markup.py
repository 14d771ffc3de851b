"""HTML out of values: text becomes markup only here, escaped, so no caption can write into the page."""

import html
import re
from collections.abc import Iterable

# What HTML forbids, and lone surrogates, which UTF-8 cannot hold.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"br", "col", "hr", "img", "meta"})
LONGEST = 240


class Markup(str):
    """HTML as it stands in the page; a plain string is text."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text as markup, safe between tags and in quoted attributes; characters that HTML forbids become U+FFFD."""
    return text if isinstance(text, Markup) else Markup(html.escape(_NO_TEXT.sub("\ufffd", text), quote=True))


def element(tag: str, *children: str, **attributes: str | float | bool | None) -> Markup:
    """One element: strings among the children are escaped, `Markup` stands as it is.

    attributes: `class_` is "class", other underscores are hyphens; numbers are rounded to two decimals; True is an
    attribute without a value, False and None leave it out.
    """
    opening = "".join([f"<{tag}", *(_attribute(name, value) for name, value in attributes.items()), ">"])
    return Markup(opening if tag in _VOID else f"{opening}{joined(children)}</{tag}>")


def joined(parts: Iterable[str]) -> Markup:
    """The parts one after the other; plain strings are escaped."""
    return Markup("".join(map(escaped, parts)))


def quoted(text: str, *, longest: int = LONGEST) -> Markup:
    """Words of the data: cut to `longest` characters, their direction of writing kept from the words around them."""
    return element("bdi", shortened(text, longest))


def shortened(text: str, longest: int) -> str:
    """Text of at most `longest` characters, `…` in place of what is cut off."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def both(chinese: str, english: str) -> Markup:
    """Chinese, and beside it English, set smaller."""
    return joined([chinese, " ", element("span", english, class_="en", lang="en")])


def number(value: float) -> str:
    """At most two decimals, none where they are zero: for places in drawings."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escaped(value if isinstance(value, str) else number(value))}"'
