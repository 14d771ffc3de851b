"""The name that was meant: what messages propose for a name that does not exist."""

import difflib
import re
from collections.abc import Iterable


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """The name of `known` nearest to what was typed; None if none is near.

    Case does not count, nor which of blank, `_`, `-`, `.`, `/` stands between words: "vit_b/16" is "ViT-B-16".
    """
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(folded(name), name)
    found = difflib.get_close_matches(folded(typed), names, n=1)
    return names[found[0]] if found else None


def folded(name: str) -> str:
    """The name in lower case, with `-` for whatever stands between its words."""
    return re.sub(r"[\s_./-]+", "-", name.casefold())


def meant(typed: str, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean 'ViT-B-16'?", or "" if no name is near."""
    name = nearest(typed, known)
    return "" if name is None else f"; did you mean {name!r}?"
