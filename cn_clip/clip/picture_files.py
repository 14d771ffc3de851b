"""From the bytes of a picture to Pillow, with nothing decoded yet: the one place that hands bytes to Pillow."""

import io

from PIL import Image

from cn_clip.clip.picture_heads import Head
from cn_clip.clip.picture_names import SUFFIXES_OF

# What Pillow is asked to read, by whatever name a file goes: EPS is a program that Ghostscript would run.
FORMATS = tuple(SUFFIXES_OF)

# A file of at most so many bytes, and these for each pixel, is as other files are: 16 bits a channel take 8.
SPARE_BYTES, BYTES_PER_PIXEL = 1 << 16, 8
# Pillow's own formats that `look` does not read. HEIF is a plugin's, which a new process lacks.
_UNBOUNDED = {"TIFF", "PPM", "AVIF", "JPEG2000"}
# What Pillow itself has its plugins look at.
_PREFIX_BYTES = 16


def is_bounded(data: bytes, head: Head | None) -> bool:
    """Whether a file takes no longer than its pixels and bytes do.

    `look` bounds the formats that it reads, as far as we know them; a file of far more bytes than its pixels need may
    do what we do not know. Of the other formats, a 1 MB PPM can take a minute.
    """
    if head is not None:
        return len(data) <= SPARE_BYTES + BYTES_PER_PIXEL * head.width * head.height
    Image.init()
    takers = {name for name in FORMATS if name in Image.OPEN and _takes(name, data[:_PREFIX_BYTES])}
    return not takers or not takers <= _UNBOUNDED


def _takes(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    return accept is None or bool(accept(prefix))


def opened_here(data: bytes, head: Head | None) -> Image.Image:
    """The picture with its head read, in this process; see `pictures.opened` for what is raised, and for others.

    head: what `look` says of the bytes; without it, Pillow looks for one of `FORMATS`.
    """
    if head is not None:
        return Image.open(io.BytesIO(data), formats=(head.format,))
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
