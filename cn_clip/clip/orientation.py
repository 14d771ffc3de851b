"""Which way up a picture is: the EXIF orientation of a file, and the picture turned by it; for those who serve people.

Chinese-CLIP's own preprocessing takes pictures as they are stored, and so does all that is compared with it.
"""

import contextlib

from PIL import ExifTags
from PIL.Image import Exif, Image, Transpose

# By the value of the tag: what makes a stored picture upright. 1 is upright; any other value is a lie.
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


# In a picture's `info`: (width, height) of what was decoded at a fraction of it.
FULL_SIZE = "full_size"


def full_size(image: Image) -> tuple[int, int]:
    """(width, height) of the whole picture that `pictures.decode` decoded, perhaps at a fraction of them."""
    width, height = image.info.get(FULL_SIZE, image.size)
    return width, height


def orientation_of(image: Image) -> int:
    """1 to 8 as EXIF numbers them, of a loaded picture; 1 too where it says nothing, or what cannot be."""
    with contextlib.suppress(Exception):  # EXIF that is damaged in one way or another says nothing
        value = image.getexif().get(ExifTags.Base.Orientation)
        if value in _TURNS:
            return int(value)
    return 1


def upright(image: Image) -> Image:
    """A loaded picture as it is meant to be seen: itself, or a turned one whose EXIF no longer has an orientation."""
    turn = _TURNS.get(orientation_of(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    if FULL_SIZE in turned.info and turned.size != image.size:
        turned.info[FULL_SIZE] = turned.info[FULL_SIZE][::-1]
    turned.info.pop("exif", None)
    with contextlib.suppress(Exception):  # what is damaged cannot be written again
        exif = Exif()  # a copy: Pillow keeps that of a picture, which may be asked for again
        exif.load(image.getexif().tobytes())
        del exif[ExifTags.Base.Orientation]
        turned.info["exif"] = exif.tobytes()
    for name in ("Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # which Pillow asks for an orientation, too
        turned.info.pop(name, None)
    return turned
