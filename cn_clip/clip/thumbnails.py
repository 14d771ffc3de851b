"""Small JPEGs of pictures, for people: upright, on white; for indexes, and for browsers that do not show the file."""

import io
from dataclasses import dataclass

from PIL import Image

from cn_clip.clip.orientation import upright
from cn_clip.clip.transforms import in_8_bits

QUALITY = 80


def thumbnail(image: Image.Image, size: int, largest: int | None = None) -> bytes:
    """A JPEG of at most `size` pixels a side, upright, on white; of fewer if it had more bytes than `largest`."""
    small = in_8_bits(image).copy()
    small.thumbnail((size, size))
    small = on_white(upright(small))
    while True:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=QUALITY)
        if largest is None or len(stream.getvalue()) <= largest:
            return stream.getvalue()
        small.thumbnail((small.width * 3 // 4 or 1, small.height * 3 // 4 or 1))


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, white where it is transparent."""
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return image.convert("RGB")


@dataclass(frozen=True)
class SmallJpeg:
    """Has a process of `decoding` answer with a JPEG of at most so many pixels a side, upright, in place of pixels."""

    draft_size: int

    def jpeg(self, image: Image.Image) -> bytes:
        """The JPEG of a loaded picture as it is stored."""
        return thumbnail(image, self.draft_size)
