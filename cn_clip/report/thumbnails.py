"""Small pictures inside the page: JPEG data URIs, bounded in pixels and in bytes."""

import base64
from io import BytesIO

from PIL import Image

from cn_clip.clip.transforms import in_8_bits
from cn_clip.report.markup import Markup, element

LARGEST_SIDE = 224
QUALITIES = (82, 68, 50)


def flattened(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent; not turned by EXIF, as models see it."""
    image = in_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        drawing = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    return image.convert("RGB")


def thumbnail(image: Image.Image, *, side: int, alt: str, num_bytes: int) -> Markup:
    """An <img> of at most `side` pixels a side and `num_bytes` of JPEG, never larger than the picture.

    Coarser, then smaller, until it fits. alt: what it shows, for those who do not see it.
    """
    small = flattened(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = _fitting(small, num_bytes)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
    return element("img", src=uri, alt=alt, width=small.width, height=small.height)


def _fitting(image: Image.Image, num_bytes: int) -> bytes:
    while True:
        for quality in QUALITIES:
            data = _jpeg(image, quality)
            if len(data) <= num_bytes:
                return data
        if max(image.size) <= 16:
            return data
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = BytesIO()
    image.save(stream, format="JPEG", quality=quality, optimize=True)
    return stream.getvalue()
