"""Which files count as pictures: those with a suffix of this list, and those without any that begin as pictures do.

Imports nothing heavy, for the options of commands.
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Literal, TypeAlias

# How a picture file becomes pixels; see `transforms.ImageTransform`.
Decode: TypeAlias = Literal["exact", "auto", "fast", "reference"]

# By PIL's name of the format, the usual suffix first. PIL reads HEIF only with a plugin; without it the file is named.
SUFFIXES_OF: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "HEIF": (".heic", ".heif"),
}
PICTURE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)

# Enough of a file for `begins_as_picture`.
HEAD_BYTES = 16
_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "),
    *(b"P%d%c" % (kind, blank) for kind in range(1, 7) for blank in b" \n\r\t"),
)
_BRANDS = (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypheix", b"ftypmif1")


def suffix_of(name: str) -> str:
    """`a/B.JPG` -> `.jpg`; "" for a name without a suffix."""
    return os.path.splitext(name)[1].lower()


def begins_as_picture(head: bytes) -> bool:
    """Whether the first `HEAD_BYTES` of a file are those of a picture; it may be damaged behind them."""
    return head.startswith(_BEGINNINGS) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP") or head[4:12] in _BRANDS


def is_picture_file(path: str) -> bool:
    """Whether a file counts as a picture. One without a suffix that cannot be read does: its reader says why."""
    suffix = suffix_of(path)
    if suffix:
        return suffix in PICTURE_SUFFIXES
    try:
        with open(path, "rb") as stream:
            return begins_as_picture(stream.read(HEAD_BYTES))
    except OSError:
        return True


def passed_over(where: object, names: Iterable[str]) -> str:
    """One sentence about files of `where` that do not count, "" without any: how many, by suffix."""
    counts = Counter(suffix_of(name) or "without suffix" for name in names)
    if not counts:
        return ""
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8))
    more = ", …" if len(counts) > 8 else ""
    return (
        f"{where}: 跳过 {counts.total()} 个不是图片的文件 / passed over {counts.total()} files that are no pictures by "
        f"their names: {listed}{more}"
    )
