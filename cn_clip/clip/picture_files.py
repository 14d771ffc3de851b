"""From the bytes of a picture to Pillow: what a file declares, and opening it; nothing is decoded but RAW.

A decoder takes time by the pixels, but for some files of a few kilobytes: a comment in a million pieces, a thousand
empty scans, metadata whose entries all name the same bytes. `look` refuses them; it is linear in the bytes and holds no
copy of them. It follows Pillow: where Pillow would stop, it stops, and leaves the error to Pillow.
"""

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cn_clip.clip import photo_files
from cn_clip.clip.orientation import FULL_SIZE
from cn_clip.clip.picture_names import HEAD_BYTES, MOST_JPEG_PIXELS, MOST_PIXELS, SUFFIXES_OF, format_of
from cn_clip.errors import DataError

# An honest file: 10 scans of a progressive JPEG (mozjpeg: 14), 20 segments (255 more for a large colour profile).
MAX_SCANS = 500
# Scans times pixels; a scan without data takes 1 to 3 nanoseconds a pixel, so 5 seconds at most.
MAX_SCANNED_PIXELS = 2_000_000_000
MAX_SEGMENTS = 512
# Between segments of a JPEG or blocks of a GIF; Pillow passes over it byte by byte.
MAX_JUNK_BYTES = 1 << 16
# Pillow joins the pieces of a GIF's comments one by one, in a time that grows with the square of their bytes.
MAX_COMMENT_BYTES = 1 << 16
MAX_BLOCKS = 1 << 16
# Chunks of a PNG: so many, and one more for so many bytes of the file. Programs write pixels in chunks of 8 KB or more.
MAX_CHUNKS, BYTES_PER_CHUNK = 1000, 512
# Each colour profile is unpacked, to a megabyte at most.
MAX_PROFILES = 8
# A run-length coded BMP is decoded in Python, a pixel at a time, and one code may skip 255 lines.
MAX_RUN_LENGTH_PIXELS, MAX_RUN_LENGTH_WIDTH = 16_000_000, 1 << 15
# Of metadata in the form of TIFF: the values together, beyond twice the bytes they lie in, and how deep they nest.
SPARE_DIRECTORY_BYTES, MAX_DIRECTORIES = 1 << 20, 8

# What Pillow is asked to read, by whatever name a file goes: EPS is a program that Ghostscript would run.
FORMATS = tuple(SUFFIXES_OF)

# A file of at most so many bytes, and these for each pixel, is as other files are: 16 bits a channel take 8.
SPARE_BYTES, BYTES_PER_PIXEL = 1 << 16, 8
# Formats of which `look` reads the size at most.
UNBOUNDED = {"TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "RAW"}
# What Pillow itself has its plugins look at.
_PREFIX_BYTES = 16

_JPEG_MARKER = re.compile(rb"([^\xff]*)\xff+([^\xff])", re.DOTALL)
# Within a scan: all but escaped bytes and restart markers.
_SCAN_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_WITHOUT_LENGTH = frozenset((0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
_EXIF = b"Exif\0\0"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INNER_DIRECTORIES = (0x8769, 0x8825, 0xA005)
_WIDTH, _HEIGHT, _PHOTOMETRIC, _INNER_PICTURES, _DNG_VERSION = 256, 257, 262, 330, 50706
# What the values of a sensor are called.
_SENSOR = {32803, 34892}
# The size of a picture in boxes: of each of its tiles, and of the whole.
_EXTENT = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
# Boxes that describe come before those that hold pixels.
_DESCRIPTION_BYTES = 1 << 18


@dataclass(frozen=True)
class Head:
    """format: of `picture_names`. width, height: pixels of the first frame, or of what holds it if that is larger.

    Of a format in `UNBOUNDED` they are what the file says, and 0 where it takes a decoder to know.
    """

    format: str
    width: int
    height: int


class TooManyPixelsError(DataError):
    """A picture is larger than is decoded; `size` is its width and height in words."""

    def __init__(self, size: str, most: int) -> None:
        super().__init__(f"too large: {size} pixels, at most {most} are decoded")
        self.size = size


def look(data: bytes) -> Head | None:
    """The head of a picture; None for what is none, and for one that is cut within its head.

    Raises DataError for a structure that takes a decoder much longer, or much more memory, than its pixels.
    """
    try:
        for start, reader in _READERS.items():
            if data.startswith(start):
                return reader(data)
        kind = format_of(data[:HEAD_BYTES])
        if data.startswith(_TIFF_STARTS):
            check_directory(data)
            return _tiff(data, kind or "TIFF")
    except (struct.error, IndexError):  # cut
        return None
    if kind in ("AVIF", "HEIF"):
        extents = [
            (int.from_bytes(width, "big"), int.from_bytes(height, "big"))
            for width, height in _EXTENT.findall(data, 0, _DESCRIPTION_BYTES)
        ]
        return Head(kind, *max(extents, key=lambda one: one[0] * one[1], default=(0, 0)))
    return Head(kind, 0, 0) if kind in UNBOUNDED else None


def look_at_start(data: bytes) -> None:
    """Raises DataError where the first bytes of a JPEG or GIF have more of what `look` counts than a whole one may."""
    if data.startswith((b"\xff\xd8\xff", b"GIF8")):
        look(data)


def _jpeg(data: bytes) -> Head | None:
    size, exif, junk, position = None, bytearray(), 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _JPEG_MARKER.match(data, position)
        if found is None:
            return None
        junk += len(found[1])
        if junk > MAX_JUNK_BYTES:
            raise DataError(f"a JPEG with more than {MAX_JUNK_BYTES} bytes that belong to no segment")
        marker, position = found[2][0], found.end()
        if marker in _WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        body = data[position + 2 : position + length]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", body, 1)
            size = (width, height)
        elif marker == 0xE1 and body[:6] == _EXIF:
            exif += body[6:]
        elif marker == 0xE2 and body[:4] == b"MPF\0":
            check_directory(body[4:])
        elif marker == 0xDA:
            break
        position += length
    else:
        raise DataError(f"a JPEG with more than {MAX_SEGMENTS} segments before its pixels")
    check_directory(bytes(exif))
    if size is None:
        return None
    _check_scans(data, position, size[0] * size[1])
    return Head("JPEG", *size)


def _check_scans(data: bytes, position: int, num_pixels: int) -> None:
    """position: behind the marker of the first scan."""
    if num_pixels > MOST_JPEG_PIXELS:  # refused for that
        return
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(num_pixels, 1))
    # The bytes of other segments, and of pictures behind this one, may look like scans: only then is it counted.
    if 1 + data.count(b"\xff\xda", position) <= most:
        return
    marker, scans = 0xDA, 0
    for _ in range(MAX_BLOCKS):
        scans += marker == 0xDA
        if scans > most:
            break
        if marker not in _WITHOUT_LENGTH:
            position += struct.unpack_from(">H", data, position)[0]
        found = _SCAN_MARKER.search(data, position)
        if found is None or found[1] == b"\xd9":
            return
        marker, position = found[1][0], found.end()
    raise DataError(f"a JPEG of {num_pixels} pixels with more than {most} scans")


def _gif(data: bytes) -> Head | None:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = comment_bytes = junk = 0
    while (kind := data[position]) != 0x3B:  # ";": the end
        position += 1
        if kind == 0x2C:  # ",": a frame
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position)
            return Head("GIF", max(width, left + frame_width), max(height, top + frame_height))
        if kind != 0x21:  # "!": an extension
            junk += 1
            if junk > MAX_JUNK_BYTES:
                raise DataError(f"a GIF with more than {MAX_JUNK_BYTES} bytes that belong to no block")
            continue
        is_comment, position = data[position] == 0xFE, position + 1
        while length := data[position]:
            position, blocks, comment_bytes = position + length + 1, blocks + 1, comment_bytes + is_comment * length
            if comment_bytes > MAX_COMMENT_BYTES:
                raise DataError(f"a GIF with more than {MAX_COMMENT_BYTES} bytes of comments")
            if blocks > MAX_BLOCKS:
                raise DataError(f"a GIF with more than {MAX_BLOCKS} blocks before its first frame")
        position += 1
    return None


def _png(data: bytes) -> Head | None:
    position, size, profiles, most = 8, None, 0, MAX_CHUNKS + len(data) // BYTES_PER_CHUNK
    for _ in range(most):
        length, kind = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"IEND")
        position += 8
        if kind == b"IHDR":
            if size is not None:
                raise DataError("a PNG with two heads")
            size = struct.unpack_from(">II", data, position)
        elif kind == b"eXIf":
            check_directory(data[position : position + length])
        elif kind == b"iCCP":
            profiles += 1
            if profiles > MAX_PROFILES:
                raise DataError(f"a PNG with more than {MAX_PROFILES} colour profiles")
        elif kind == b"IEND":
            return None if size is None else Head("PNG", *size)
        position += length + 4
    raise DataError(f"a PNG of {len(data)} bytes with more than {most} chunks")


def _webp(data: bytes) -> Head | None:
    if data[8:12] != b"WEBP":
        return None
    kind, size, position = data[12:16], None, 12
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        size = (width, height)
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size = (width & 0x3FFF, height & 0x3FFF)
    for _ in range(MAX_BLOCKS):
        if position + 8 > len(data):
            return None if size is None else Head("WEBP", *size)
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            check_directory(data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    raise DataError(f"a WebP with more than {MAX_BLOCKS} chunks")


def _bmp(data: bytes) -> Head | None:
    (head_bytes,) = struct.unpack_from("<I", data, 14)
    if head_bytes == 12:
        return Head("BMP", *struct.unpack_from("<HH", data, 18))
    width, height, _, compression = struct.unpack_from("<IiII", data, 18)
    height = abs(height)
    if compression in (1, 2) and (width > MAX_RUN_LENGTH_WIDTH or width * height > MAX_RUN_LENGTH_PIXELS):
        raise DataError(
            f"a run-length coded BMP of {width} x {height}; expected at most {MAX_RUN_LENGTH_PIXELS} pixels and "
            f"{MAX_RUN_LENGTH_WIDTH} a line, or one without compression"
        )
    return Head("BMP", width, height)


def _tiff(data: bytes, kind: str) -> Head:
    """The head of a TIFF, or of the RAW file that begins as one: it holds the values of a sensor somewhere."""
    order, is_big = ("<" if data[:1] == b"I" else ">"), data[2:4] in (b"+\0", b"\0+")
    if is_big or kind == "RAW":
        return Head(kind, 0, 0)
    first = _first_values(data, order, struct.unpack_from(order + "I", data, 4)[0])
    waiting, is_raw = [first], _DNG_VERSION in first
    for offset in first.get(_INNER_PICTURES, [])[:MAX_DIRECTORIES]:
        waiting.append(_first_values(data, order, offset))
    is_raw |= any(_SENSOR & set(one.get(_PHOTOMETRIC, [])) for one in waiting)
    width, height = ((first.get(tag) or [0])[0] for tag in (_WIDTH, _HEIGHT))
    return Head("RAW", 0, 0) if is_raw else Head("TIFF", width, height)


def _first_values(data: bytes, order: str, start: int) -> dict[int, list[int]]:
    """The whole numbers of a directory of TIFF data, by tag; of long lists the first few."""
    found = dict[int, list[int]]()
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
        form = {3: "H", 4: "I", 13: "I"}.get(kind)
        if form is not None and tag in (_WIDTH, _HEIGHT, _PHOTOMETRIC, _INNER_PICTURES):
            num_bytes, values = struct.calcsize(form) * values, min(values, MAX_DIRECTORIES)
            at = entry + 8 if num_bytes <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
            found[tag] = list(struct.unpack_from(f"{order}{values}{form}", data, at))
        elif tag == _DNG_VERSION:
            found[tag] = []
    return found


def check_directory(data: bytes) -> None:
    """Raises DataError where the values of TIFF data (EXIF, or a file) are far more than its bytes: they overlap."""
    while data.startswith(_EXIF):
        data = data[len(_EXIF) :]
    if not data.startswith(_TIFF_STARTS):
        return
    order, is_big = ("<" if data[:1] == b"I" else ">"), data[2:4] in (b"+\0", b"\0+")
    # The offset of the first directory lies at 4, in a large file at 8; a value of no more bytes lies in its entry.
    count_form, entry_form, inline = ("Q", "HHQQ", 8) if is_big else ("H", "HHII", 4)
    count_bytes, entry_bytes = struct.calcsize(count_form), struct.calcsize(order + entry_form)
    total, most = 0, 2 * len(data) + SPARE_DIRECTORY_BYTES
    waiting = [int.from_bytes(data[inline : 2 * inline], "little" if order == "<" else "big")]
    for _ in range(MAX_DIRECTORIES):
        start = waiting.pop() + count_bytes if waiting else len(data) + 1
        if start > len(data):
            continue
        (count,) = struct.unpack_from(order + count_form, data, start - count_bytes)
        end = start + min(count, (len(data) - start) // entry_bytes) * entry_bytes
        for tag, kind, values, offset in struct.iter_unpack(order + entry_form, data[start:end]):
            num_bytes = values * _TIFF_TYPE_BYTES.get(kind, 0)
            if tag in _INNER_DIRECTORIES:
                waiting.append(offset)
            if num_bytes > inline:
                total += max(0, min(num_bytes, len(data) - offset))
            if total > most:
                raise DataError(f"metadata of {len(data)} bytes whose values overlap")


_READERS = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
    b"RIFF": _webp,
    b"BM": _bmp,
}


# --- opening


def is_bounded(data: bytes, head: Head | None) -> bool:
    """Whether a file takes no longer than its pixels and bytes do.

    `look` bounds the formats that it reads, as far as we know them; a file of far more bytes than its pixels need may
    do what we do not know. Of the other formats, a 1 MB PPM can take a minute.
    """
    if head is not None:
        is_read = head.format not in UNBOUNDED
        return is_read and len(data) <= SPARE_BYTES + BYTES_PER_PIXEL * head.width * head.height
    takers = set(_takers(data))
    return not takers or not takers <= UNBOUNDED


def opened_here(data: bytes, head: Head | None) -> Image.Image:
    """The picture with its head read, in this process; see `pictures.opened` for what is raised, and for others.

    head: what `look` says of the bytes; without it, Pillow looks for one of `FORMATS`. Raises TooManyPixelsError where
    Image.open would warn, or raise.
    """
    image = _opened(data, None if head is None else head.format)
    most = MOST_JPEG_PIXELS if isinstance(image, JpegImageFile) else MOST_PIXELS
    if image.width * image.height > most:
        raise TooManyPixelsError(f"{image.width} x {image.height}", most)
    return image


def _opened(data: bytes, kind: str | None) -> Image.Image:
    if kind in _OWN_OPENERS:
        return _OWN_OPENERS[kind](data)
    reasons = list[str]()
    for name in _takers(data):
        if kind not in (None, name):
            continue
        try:
            return Image.OPEN[name][0](io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as Image.open does
            reasons.append(f"{error}")
    raise UnidentifiedImageError("; ".join(filter(None, reasons)) or "no known picture format")


def _takers(data: bytes) -> list[str]:
    """Pillow's formats of the list that may read what begins so."""
    Image.init()
    prefix = data[:_PREFIX_BYTES]
    found = [(name, Image.OPEN[name][1]) for name in FORMATS if name in Image.OPEN]
    return [name for name, accept in found if accept is None or accept(prefix) is True]


# Of a JPEG that holds several pictures (MPO) Pillow's own opener reads where the others are, and warns of it.
_OWN_OPENERS: dict[str | None, Callable[[bytes], Image.Image]] = {
    "JPEG": lambda data: JpegImageFile(io.BytesIO(data)),
    "HEIF": photo_files.heif,
    "RAW": photo_files.raw,
}


def prepare(image: Image.Image, draft_size: int | None = None, *, most: int = MOST_PIXELS) -> None:
    """Has a picture that was opened here ready to be loaded; raises TooManyPixelsError for more than `most` pixels.

    draft_size: a JPEG will be decoded at 1/2, 1/4 or 1/8 of its size, the smallest whose sides are both at least so
    long; its pixels are counted then.
    """
    width, height = image.size
    if draft_size is not None and isinstance(image, JpegImageFile):
        image.info[FULL_SIZE] = image.size
        image.draft(None, (draft_size, draft_size))
    if image.width * image.height > most:
        raise TooManyPixelsError(f"{width} x {height}", most)


def num_decoded(head: Head, draft_size: int | None) -> int:
    """How many pixels of a file are decoded, as `prepare` counts them; 0 where its head does not say."""
    if draft_size is None or head.format != "JPEG":
        return head.width * head.height
    scale = min(head.width // draft_size, head.height // draft_size)
    step = next((one for one in (8, 4, 2) if scale >= one), 1)
    return -(-head.width // step) * -(-head.height // step)
