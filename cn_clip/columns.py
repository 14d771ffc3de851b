"""Text tables for terminals, where a Chinese character is two cells wide; for the commands that print tables."""

import unicodedata
from collections.abc import Iterable, Sequence


def width(text: str) -> int:
    """Terminal cells that `text` takes: 2 for wide and full-width characters, 0 for combining ones, else 1."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def pad(text: str, cells: int, *, right: bool = False) -> str:
    """`text` filled with spaces to `cells` terminal cells, aligned left, or right if `right`."""
    blanks = " " * (cells - width(text))
    return blanks + text if right else text + blanks


def align(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """One line a row, columns aligned and two cells apart; those numbered in `right` are aligned right.

    Raises ValueError when the rows are not of one length.
    """
    padded = [_pad_column(column, right=i in right) for i, column in enumerate(zip(*rows, strict=True))]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _pad_column(column: Sequence[str], *, right: bool) -> list[str]:
    cells = max(map(width, column))
    return [pad(text, cells, right=right) for text in column]
