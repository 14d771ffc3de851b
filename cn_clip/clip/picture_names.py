"""Which files count as pictures: those with a suffix of this list, and those without any that begin as pictures do.

Imports nothing heavy, for the options of commands.
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Literal, TypeAlias

from cn_clip.language import both, counted

# How a picture file becomes pixels; see `transforms.ImageTransform`.
Decode: TypeAlias = Literal["exact", "auto", "fast", "reference"]

# The formats that are read, by PIL's name, the usual suffix first. Of JPEGs that hold several pictures (MPO) and of
# animations it is the first. HEIF and RAW need the extra `photos`; of RAW it is the preview in the file.
SUFFIXES_OF: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "HEIF": (".heic", ".heif", ".hif"),
    "RAW": (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw"),
}
PICTURE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)

# Width times height of what is decoded; a JPEG may be decoded at a fraction of its own, and have more.
MOST_PIXELS = 178_956_970
MOST_JPEG_PIXELS = 500_000_000
# Bytes of a file that is read from a disk.
LARGEST_PICTURE = 256 << 20

# What `data.videos` may find frames in.
VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".3gp",
    ".3g2",
    ".mpg",
    ".mpeg",
    ".mts",
    ".m2ts",
    ".wmv",
)

# Enough of a file for `format_of`.
HEAD_BYTES = 64
_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n",),
    "GIF": (b"GIF8",),
    "BMP": (b"BM",),
    "RAW": (b"FUJIFILMCCD-RAW", b"II\x2a\0\x10\0\0\0CR", b"IIU\0", b"IIRO", b"IIRS", b"MMOR"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG2000": (b"\0\0\0\x0cjP  ",),
    "PPM": tuple(b"P%d%c" % (kind, blank) for kind in range(1, 7) for blank in b" \n\r\t"),
}
# Of files in boxes, as phones write them.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIF"),
    b"crx ": "RAW",
}
# Of pictures in any coding, which one of the brands behind it names.
_ANY_BRANDS = (b"mif1", b"msf1")


def suffix_of(name: str) -> str:
    """`a/B.JPG` -> `.jpg`; "" for a name without a suffix."""
    return os.path.splitext(name)[1].lower()


def format_of(head: bytes) -> str | None:
    """The format that the first `HEAD_BYTES` of a file are of; it may be damaged behind them. None for no picture.

    DNG and most other kinds of RAW begin as a TIFF does.
    """
    if head[4:8] == b"ftyp":
        if head[8:12] not in _ANY_BRANDS:
            return _BRANDS.get(head[8:12])
        end = min(int.from_bytes(head[:4], "big"), HEAD_BYTES)
        others = (head[at : at + 4] for at in range(16, end, 4))
        return next((_BRANDS[one] for one in others if one in _BRANDS), "HEIF")
    if (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    return next((name for name, beginnings in _BEGINNINGS.items() if head.startswith(beginnings)), None)


def begins_as_picture(head: bytes) -> bool:
    """Whether the first `HEAD_BYTES` of a file are those of a picture; it may be damaged behind them."""
    return format_of(head) is not None


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
    number = counts.total()
    return both(
        f"{where}: 跳过 {number} 个从名字看不是图片的文件：{listed}{more}",
        f"{where}: skipped {counted(number, 'file')} that {'is' if number == 1 else 'are'} not images by name: "
        f"{listed}{more}",
    )
