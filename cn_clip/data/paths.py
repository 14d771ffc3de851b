"""Paths: how folders of pictures are walked, and how a path is spelled as text.

A name on a disk is any bytes; JSON, addresses, logs and tables hold only Unicode, in one line. Archives unpacked on
another system leave names in GBK; Python reads such a byte as a lone surrogate. `spelled` gives each path a spelling
that all of these hold, the same for no two paths, and readable where the bytes are GBK.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

# Before a part of a path that is spelled otherwise than by its own characters.
_UTF8, _GBK, _BYTES, _PAIRS = "utf-8:", "gbk:", "bytes:", "utf-16:"
_MARKS = (_UTF8, _GBK, _BYTES, _PAIRS)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Controls and ends of lines: a name with them would write lines of its own into a log or a table.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "").replace("/", "")


def walked(
    root: str | os.PathLike[str], on_error: Callable[[OSError], object]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of folders in it, names of files in it) of `root` and of all below it, names in order.

    A caller that empties the names of folders enters none of them. on_error: called for a folder that cannot be listed,
    with its name in the error; it may raise.
    """
    seen = set[tuple[int, int]]()
    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=True):
        try:
            facts = os.stat(folder)
        except OSError as error:  # removed meanwhile
            folders.clear()
            on_error(error)
            continue
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in names if not name.startswith("."))


def spelled(path: str) -> str:
    """The spelling of a path, its parts joined by "/"; that of a UTF-8 path is the path itself.

    `照片/b.jpg` stays. The bytes `\\xd5\\xd5\\xc6\\xac/b.jpg`, 照片 in GBK, become `gbk:照片/b.jpg`; `\\xff.jpg`, in
    neither, becomes `bytes:%FF.jpg`, as does a part with controls, `bytes:a%0A.jpg`; a part that begins with such a
    mark gets another: `utf-8:gbk:a.jpg`.
    """
    if ":" in path or _SURROGATE.search(path) or _CONTROL.search(path):
        return "/".join(map(_spelled, path.split("/")))
    return path


def path_of(spelling: str) -> str:
    """The path of a spelling, as Python reads it from a disk: the inverse of `spelled`.

    Raises ValueError for a text that `spelled` never returns.
    """
    parts = []
    for part in spelling.split("/"):
        if part.startswith(_UTF8):
            part = part.removeprefix(_UTF8)
        elif part.startswith(_GBK):
            part = part.removeprefix(_GBK).encode("gbk").decode("utf-8", "surrogateescape")
        elif part.startswith(_PAIRS):
            part = unquote_to_bytes(part.removeprefix(_PAIRS)).decode("utf-8", "surrogatepass")
        elif part.startswith(_BYTES):
            part = unquote_to_bytes(part.removeprefix(_BYTES)).decode("utf-8", "surrogateescape")
        parts.append(part)
    return "/".join(parts)


def characters(part: str) -> str | None:
    """The characters of a part of a path, in UTF-8 or GBK; None for bytes that are neither, and for controls."""
    spelling = _spelled(part)
    if spelling == part or spelling == _UTF8 + part:
        return part
    return spelling.removeprefix(_GBK) if spelling.startswith(_GBK) else None


def readable(value: Any) -> Any:
    """A value of JSON whose texts hold no lone surrogate: those that do are spelled."""
    if isinstance(value, str):
        return spelled(value) if _SURROGATE.search(value) else value
    if isinstance(value, dict):
        return {readable(key): readable(one) for key, one in value.items()}
    return [readable(one) for one in value] if isinstance(value, list) else value


def _spelled(part: str) -> str:
    if not _SURROGATE.search(part):
        if _CONTROL.search(part):
            return _BYTES + quote_from_bytes(part.encode(), safe=_UNQUOTED)
        return _UTF8 + part if part.startswith(_MARKS) else part
    data = _SURROGATE.sub("", part).encode()
    with contextlib.suppress(UnicodeEncodeError):
        data = part.encode("utf-8", "surrogateescape")
    if data.decode("utf-8", "surrogateescape") != part:  # from a disk of Windows, where a name is any 16-bit numbers
        return _PAIRS + quote_from_bytes(part.encode("utf-8", "surrogatepass"), safe=_UNQUOTED)
    text = data.decode("gbk", "replace")
    if text.isprintable() and text.encode("gbk", "replace") == data:
        return _GBK + text
    return _BYTES + quote_from_bytes(data, safe=_UNQUOTED)
