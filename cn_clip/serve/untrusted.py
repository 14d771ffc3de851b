"""Pictures that strangers send: from a data URL to a decoded picture, bounded before anything is decoded."""

import io
from typing import TYPE_CHECKING

from cn_clip.clip.backends.base import Pixels
from cn_clip.clip.inputs import PictureTransform
from cn_clip.clip.pictures import data_url_bytes
from cn_clip.errors import DataError
from cn_clip.serve.refusals import RefusalError

if TYPE_CHECKING:
    from PIL.Image import Image

# Only these plugins of PIL see the bytes, whatever the bytes claim to be.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_NAMES = "JPEG, PNG, WebP, GIF or BMP"
_EXPECTED = f'expected "data:image/png;base64,…" ({_NAMES}) with the picture itself'
_SHOWN_CHARS = 40


def picture_bytes(data_url: str, param: str) -> bytes:
    """The bytes in a data URL; raises RefusalError (400) naming `param`. Addresses and paths are never followed."""
    if not data_url[:5].lower() == "data:":
        raise _invalid(f"{param}: no URL or path is read, got {data_url[:_SHOWN_CHARS]!a}; {_EXPECTED}", param)
    try:
        return data_url_bytes(data_url)
    except DataError as error:
        raise _invalid(f"{param}: {error}; {_EXPECTED}", param) from error


def opened(data: bytes, param: str, *, max_pixels: int) -> "Image":
    """The picture with its head read and nothing decoded; raises RefusalError (400) naming `param`, and the bound."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("more", param, max_pixels) from error
    except UnidentifiedImageError as error:
        raise _invalid(f"{param}: {len(data)} bytes of no known format; expected {_NAMES}", param) from error
    except Exception as error:  # what PIL's plugins raise has no common type
        raise _undecodable(error, param) from error
    if image.width * image.height > max_pixels:
        raise _too_large(f"{image.width} x {image.height}", param, max_pixels)
    return image


def pixels(image: "Image", param: str, transform: PictureTransform) -> Pixels:
    """Pixels (3, R, R) of the first frame of what `opened` gave; raises RefusalError (400) naming `param`."""
    try:
        with image:
            if transform.draft_size is not None:
                image.draft(None, (transform.draft_size, transform.draft_size))
            image.load()
            return transform.array(image)
    except Exception as error:
        raise _undecodable(error, param) from error


def _undecodable(error: Exception, param: str) -> RefusalError:
    return _invalid(f"{param}: the picture does not decode ({error})", param)


def _too_large(size: str, param: str, max_pixels: int) -> RefusalError:
    message = f"{param}: at most {max_pixels} pixels a picture are read, this one has {size}"
    return RefusalError(400, message, param=param, code="image_too_large")


def _invalid(message: str, param: str) -> RefusalError:
    return RefusalError(400, message, param=param, code="invalid_image")
