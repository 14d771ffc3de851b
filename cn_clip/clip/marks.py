"""How a fingerprint says what is done with a model's vectors: which may stand beside each other."""

import re

_MERGED, _CUT = "+merge", "+first"


def marked(fingerprint: str, *, merge_tokens: int = 0, dimensions: int | None = None) -> str:
    """The fingerprint of a model that gives other vectors: its tokens are merged, its vectors cut.

    marked("ab12", merge_tokens=8, dimensions=64) is "ab12+merge8+first64"; of 0 and None, as it is.
    """
    merged = f"{_MERGED}{merge_tokens}" if merge_tokens else ""
    return fingerprint + merged + (f"{_CUT}{dimensions}" if dimensions else "")


def merged_in(fingerprint: str) -> int:
    """The tokens merged a layer, as a fingerprint says."""
    return _number(_MERGED, fingerprint) or 0


def cut_in(fingerprint: str) -> int | None:
    """How many numbers of each vector are left, as a fingerprint says; None: all."""
    return _number(_CUT, fingerprint)


def _number(mark: str, fingerprint: str) -> int | None:
    found = re.search(rf"{re.escape(mark)}(\d+)(?=\+|$)", fingerprint)
    return int(found[1]) if found else None
