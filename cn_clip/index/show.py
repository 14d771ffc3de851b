"""Ids and captions as terminals can show them."""

import unicodedata


def shown(value: object) -> str:
    """One line of printable text: what is no UTF-8 or moves the cursor comes out as an escape."""
    return "".join(_escaped(character) for character in str(value))


def _escaped(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character
