"""Small picture files that take seconds or gigabytes to decode; made here, for the tests and `benchmarks/`."""

import io
import struct
import zlib
from collections.abc import Iterable

from PIL import Image

_GIF_TAIL = b",\0\0\0\0\x08\0\x08\0\0\x02\x16\x8c-\x99\x87*\x1c\xdc3\xa0\x02u\xec\x95\xfa\xa8\xde`\x8c\x04\x91L\x01\0;"
_LARGEST_SEGMENT = 65_533


def _encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def _gif_blocks(data: bytes) -> bytes:
    pieces = [data[start : start + 255] for start in range(0, len(data), 255)]
    return b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"


def gif(extensions: bytes = b"") -> bytes:
    """An 8 x 8 GIF with extension blocks before its frame."""
    return b"GIF89a\x08\0\x08\0\x80\0\0\0\0\0\xff\xff\xff" + extensions + _GIF_TAIL


def gif_comment(num_bytes: int) -> bytes:
    """One comment, which Pillow joins piece by piece: 1.6 MB take 12 s, 7.4 MB four minutes."""
    return gif(b"!\xfe" + _gif_blocks(b"x" * num_bytes))


def gif_comments(count: int) -> bytes:
    """Many comments, which Pillow joins too."""
    return gif((b"!\xfe" + _gif_blocks(b"x" * 255)) * count)


def jpeg_scans(count: int, side: int = 1024) -> bytes:
    """A progressive JPEG whose last scan comes `count` times; each goes through the whole picture."""
    data = _encoded(Image.new("L", (side, side), 120), "JPEG", progressive=True)
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + data[begin:-2] * count + data[-2:]


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(segments: Iterable[bytes], side: int = 8) -> bytes:
    """A JPEG with segments behind its start."""
    data = _encoded(Image.new("RGB", (side, side)), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_exif_pieces(count: int) -> bytes:
    """EXIF in many segments, which Pillow joins one by one: 10 MB take minutes."""
    return jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 90) for _ in range(count))


def directory(num_entries: int, num_bytes: int) -> bytes:
    """TIFF data whose entries all have the same `num_bytes` bytes for their value, as far as the file goes."""
    entries = b"".join(struct.pack("<HHII", 40_000 + number, 1, num_bytes, 8) for number in range(num_entries))
    head = b"II*\0" + struct.pack("<I", 8 + num_bytes) + bytes(num_bytes)
    return head + struct.pack("<H", num_entries) + entries + bytes(4)


def jpeg_exif_directory(num_entries: int = 20_000, num_bytes: int = 1 << 20) -> bytes:
    """EXIF whose entries share their value: Pillow reads it for each, 20,000 MiB of 1.3."""
    data = directory(num_entries, num_bytes)
    pieces = [data[start : start + _LARGEST_SEGMENT - 6] for start in range(0, len(data), _LARGEST_SEGMENT - 6)]
    return jpeg_with(segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes, side: int = 8, at: int = 33) -> bytes:
    """A PNG with more chunks, by default behind its head."""
    data = _encoded(Image.new("RGB", (side, side)), "PNG")
    return data[:at] + chunks + data[at:]


def png_chunks(count: int) -> bytes:
    """Many chunks of no bytes."""
    return png_with(chunk(b"prIv") * count)


def png_exif_directory(num_entries: int = 20_000, num_bytes: int = 1 << 20) -> bytes:
    """The same in PNG."""
    return png_with(chunk(b"eXIf", directory(num_entries, num_bytes)))


def tiff_directory(num_entries: int = 20_000, num_bytes: int = 1 << 20) -> bytes:
    """The same as a TIFF file."""
    return directory(num_entries, num_bytes)


def bmp_run_length(side: int) -> bytes:
    """Run-length coded, of one pixel a line; Pillow fills up the rest, a pixel at a time."""
    lines = b"\1\1\0\0" * side + b"\0\1"
    palette = bytes(range(256)) * 4
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(lines), 0, 0, 256, 0)
    return (
        b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(lines), 0, 0, 54 + len(palette)) + head + palette + lines
    )


def pbm_comments(count: int) -> bytes:
    """A plain PBM of comments, each of which Pillow cuts out of the megabyte around it: 1 MB takes a minute."""
    return b"P1 8 8\n" + b"#\n" * count


# What no look at the head refuses: decoded by a process that is killed.
UNBOUNDED = {"comments of a PBM": lambda: pbm_comments(500_000)}
