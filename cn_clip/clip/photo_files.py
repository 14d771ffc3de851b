"""HEIC and RAW, as phones and cameras write them, by the packages of the extra `photos`; for `picture_files`."""

import contextlib
import io
from typing import Any

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from cn_clip import extras

# A preview of fewer pixels a side is a thumbnail: the picture is developed.
LEAST_PREVIEW = 1000
# By what LibRaw calls a turn: the orientation of EXIF.
_ORIENTATIONS = {3: 3, 5: 8, 6: 6}
# Of the metadata of a RAW file, which is a TIFF, those that belong to any picture.
_KEPT = (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.DateTime)


def heif(data: bytes) -> Image.Image:
    """A HEIC picture, upright: its turns are part of the format. Raises MissingExtraError, SyntaxError."""
    package = extras.require("pillow_heif", extra="photos", purpose="a HEIC picture")
    image: Image.Image = package.HeifImageFile(io.BytesIO(data))
    return image


def raw(data: bytes) -> Image.Image:
    """The preview that a camera put into its RAW file, else the picture at half its size; as stored, with EXIF.

    Raises MissingExtraError, OSError.
    """
    package = extras.require("rawpy", extra="photos", purpose="a RAW picture")
    try:
        with package.imread(io.BytesIO(data)) as opened:
            turn, image = _ORIENTATIONS.get(opened.sizes.flip), _preview(package, opened)
            if image is None:  # in the colours that the camera meant, and not turned
                image = Image.fromarray(opened.postprocess(half_size=True, use_camera_wb=True, user_flip=0))
    except package.LibRawError as error:
        reason = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        raise OSError(f"LibRaw: {reason}") from error
    exif, own = _exif(data), Image.Exif()
    own.load(image.info.get("exif", b""))  # what `getexif` gives stays with a picture, whatever its `info` says later
    if (orientation := own.get(ExifTags.Base.Orientation) or turn) is not None:
        exif[ExifTags.Base.Orientation] = orientation
    image.info["exif"] = exif.tobytes()
    image.format = "RAW"
    return image


def _preview(package: Any, opened: Any) -> Image.Image | None:
    """The largest preview; None where there is none of a useful size."""
    with contextlib.suppress(package.LibRawError):
        found = opened.extract_thumb()
        if found.format == package.ThumbFormat.JPEG:
            image: Image.Image = JpegImageFile(io.BytesIO(found.data))
        else:
            image = Image.fromarray(found.data)
        return image if max(image.size) >= LEAST_PREVIEW else None
    return None


def described(exif: Image.Exif) -> Image.Exif:
    """Of the metadata of a TIFF, or a RAW file, those that belong to any picture: camera, dates, place."""
    kept = Image.Exif()
    kept.update({tag: exif[tag] for tag in _KEPT if tag in exif})
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        values = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != ExifTags.IFD.MakerNote}
        if values:
            kept.get_ifd(directory).update(values)
    return kept


def _exif(data: bytes) -> Image.Exif:
    """The metadata of a RAW file that is a TIFF; nothing of others, or where it is damaged."""
    with contextlib.suppress(Exception):  # Pillow raises errors of many types
        found = Image.Exif()
        found.load(data)
        kept = described(found)
        kept.tobytes()
        return kept
    return Image.Exif()
