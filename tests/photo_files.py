"""Files as phones and cameras write them, of a few kilobytes: HEIC, several JPEGs in one file, DNG."""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[np.uint8]


def jpeg(image: Image.Image, **given: object) -> bytes:
    """A JPEG file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", **given)
    return stream.getvalue()


def heic(image: Image.Image, **given: object) -> bytes:
    """A HEIC file; needs pillow-heif."""
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, **given)
    return stream.getvalue()


def mpo(*images: Image.Image) -> bytes:
    """JPEGs in one file, as iPhones and Samsungs write a portrait and its depth."""
    stream = io.BytesIO()
    images[0].save(stream, "MPO", save_all=True, append_images=images[1:])
    return stream.getvalue()


def dng(levels: Levels, *, orientation: int = 1, preview: bytes = b"", preview_size: tuple[int, int] = (0, 0)) -> bytes:
    """A DNG of the grey levels (H, W) behind an RGGB filter, uncompressed, with a JPEG as its preview if given."""
    height, width = levels.shape
    sensor = (levels.astype("<u2") * 256).tobytes()
    head = {
        254: ("I", [1 if preview else 0]),
        271: ("s", b"Leica Camera AG\0"),
        272: ("s", b"LEICA Q3\0"),
        274: ("H", [orientation]),
        306: ("s", b"2021:05:03 14:22:10\0"),
        50706: ("B", [1, 4, 0, 0]),
        50708: ("s", b"LEICA Q3\0"),
        50721: ("i/", [1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1]),
        50728: ("I/", [1, 1, 1, 1, 1, 1]),
        50778: ("H", [21]),
    }
    raw = {
        254: ("I", [0]),
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [16]),
        259: ("H", [1]),
        262: ("H", [32803]),
        273: ("I", ["sensor"]),
        277: ("H", [1]),
        278: ("I", [height]),
        279: ("I", [len(sensor)]),
        33421: ("H", [2, 2]),
        33422: ("B", [0, 1, 1, 2]),
        50714: ("H", [0]),
        50717: ("I", [65535]),
    }
    if not preview:
        return _tiff([{**head, **raw}], {"sensor": sensor})
    shown = {
        256: ("I", [preview_size[0]]),
        257: ("I", [preview_size[1]]),
        258: ("H", [8, 8, 8]),
        259: ("H", [7]),
        262: ("H", [6]),
        273: ("I", ["preview"]),
        277: ("H", [3]),
        278: ("I", [preview_size[1]]),
        279: ("I", [len(preview)]),
        330: ("I", ["directory 1"]),
    }
    return _tiff([{**head, **shown}, raw], {"sensor": sensor, "preview": preview})


def _tiff(directories: list[dict[int, tuple[str, object]]], blocks: dict[str, bytes]) -> bytes:
    """Little-endian TIFF data; a name among the values stands for where the block, or the directory, begins."""
    kinds = {"B": 1, "s": 2, "H": 3, "I": 4, "I/": 5, "i/": 10}
    at, places = 8, dict[str, int]()
    for number, entries in enumerate(directories):
        places[f"directory {number}"] = at
        at += 2 + 12 * len(entries) + 4
    for name, block in blocks.items():
        places[name], at = at, at + len(block) + len(block) % 2
    heads, tail = b"II*\0" + struct.pack("<I", 8), b""
    for entries in directories:
        heads += struct.pack("<H", len(entries))
        for tag, (form, values) in sorted(entries.items()):
            if isinstance(values, bytes):
                count, data = len(values), values
            else:
                assert isinstance(values, list)
                numbers = [places[one] if isinstance(one, str) else one for one in values]
                data = struct.pack(f"<{len(numbers)}{form[0]}", *numbers)
                count = len(numbers) // (2 if form.endswith("/") else 1)
            if len(data) > 4:
                tail += b"\0" * (len(tail) % 2)
                data, place = struct.pack("<I", at + len(tail)), data
                tail += place
            heads += struct.pack("<HHI", tag, kinds[form], count) + data.ljust(4, b"\0")
        heads += struct.pack("<I", 0)
    return heads + b"".join(block + b"\0" * (len(block) % 2) for block in blocks.values()) + tail
