"""Bytes to PIL pictures, with errors in one sentence; used by the dataset checks and the torch datasets."""

from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

from PIL import Image, UnidentifiedImageError

from cn_clip.clip.pictures import decode, opened
from cn_clip.clip.transforms import in_8_bits, is_deep
from cn_clip.errors import DataError, Where

PixelsT = TypeVar("PixelsT")
PictureCheck: TypeAlias = Literal["decode", "header", "none"]


def open_picture(data: bytes, draft_size: int | None = None) -> Image.Image:
    """The decoded picture, see `clip.pictures.decode`.

    Raises DataError when the bytes are no picture, are cut short, or hold more pixels than PIL admits.
    """
    try:
        return decode(data, draft_size)
    except Exception as error:
        raise _not_a_picture(data, error) from error


def load_picture(
    data: bytes, where: Where, transform: Callable[[Image.Image], PixelsT], *, draft_size: int | None = None
) -> PixelsT:
    """The transformed picture; raises DataError that starts with `where`."""
    try:
        return transform(open_picture(data, draft_size))
    except (DataError, OSError, ValueError) as error:  # a transform may meet what loading let pass
        raise DataError(error, at=where) from error


def check_picture(data: bytes, check: PictureCheck) -> bool:
    """Whether the picture is grey of more than 8 bits; raises DataError when the bytes are no readable picture.

    "decode" reads all the compressed data (JPEG at one eighth of the size, which costs half), "header" only the
    structure at the front (all of a file that `clip.pictures.opened` gives to another process), "none" nothing.
    """
    if check == "none":
        return False
    try:
        image = opened(data)
        if check == "decode":
            image.draft("L", (1, 1))
            image.load()
            in_8_bits(image)
        return is_deep(image)
    except Exception as error:
        raise _not_a_picture(data, error) from error


def _not_a_picture(data: bytes, error: Exception) -> DataError:
    if not data:
        return DataError("the picture is empty (0 bytes)")
    if isinstance(error, DataError):
        return DataError(f"the picture of {len(data)} bytes is not decoded: {error}")
    reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else f"{error}"
    return DataError(f"the picture of {len(data)} bytes does not decode ({reason})")
