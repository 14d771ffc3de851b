"""What a picture and its name say of it, as fields of an item of an index: date, camera, place, folder and file.

EXIF may hold anything: what is no date, no place on Earth or no word is left out.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias

from PIL import ExifTags, Image

from cn_clip.clip.pictures import opened
from cn_clip.retrieval.segments import ItemId

Facts: TypeAlias = dict[str, str | float]
Tags: TypeAlias = Mapping[int, Any]

MAX_CAMERA_CHARS = 64
# No photograph is older; a camera whose clock was never set writes 0000 or 0001.
FIRST_YEAR = 1826
# Seven decimals of a degree are a centimetre.
_DECIMALS = 7
_DATE = re.compile(r"\s*(\d{4})[:/.-](\d\d?)[:/.-](\d\d?)(?:[ T]+(\d\d?):(\d\d?)(?::(\d\d?))?)?", re.ASCII)


def of_name(item_id: ItemId, id_prefix: str = "") -> Facts:
    """`folder` and `file` of a path relative to its source, 旅行/2021/a.jpg -> 旅行/2021, a.jpg; nothing of an int."""
    if not isinstance(item_id, str):
        return {}
    folder, _, file = item_id.removeprefix(id_prefix).rpartition("/")
    return {"folder": folder, "file": file}


def of_bytes(data: bytes) -> Facts:
    """As `of_picture`, of a file that is not decoded for it; nothing of what cannot be opened."""
    with contextlib.suppress(Exception), opened(data) as image:  # Pillow's plugins raise errors of many types
        return of_picture(image)
    return {}


def of_picture(image: Image.Image) -> Facts:
    """`date`, `camera`, `latitude` and `longitude` of an opened picture, as far as its EXIF says them; never raises.

    date: when it was taken, as the camera's clock said, 2021-05-03T14:22:10, or without a time. Degrees lie in
    [-90, 90] and [-180, 180], north and east above 0.
    """
    main, detail, place = _directories(image)
    taken = (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized)
    dates = (_date(tags.get(tag)) for tag in taken for tags in (detail, main))
    facts: Facts = {}
    if date := next(filter(None, dates), ""):
        facts["date"] = date
    if taken_with := camera(_text(main.get(ExifTags.Base.Make)), _text(main.get(ExifTags.Base.Model))):
        facts["camera"] = taken_with
    latitude = _degrees(place, ExifTags.GPS.GPSLatitude, "NS", 90)
    longitude = _degrees(place, ExifTags.GPS.GPSLongitude, "EW", 180)
    # Phones that do not know where they are write 0, 0, which is in the sea.
    if latitude is not None and longitude is not None and (latitude or longitude):
        facts |= {"latitude": latitude, "longitude": longitude}
    return facts


def _directories(image: Image.Image) -> tuple[Tags, Tags, Tags]:
    """The main directory of the EXIF, that of the exposure, and that of the place; what is damaged is empty."""
    found: list[Tags] = [{}, {}, {}]
    with contextlib.suppress(Exception):  # Pillow raises errors of many types
        exif = image.getexif()
        found[0] = dict(exif)
        for number, tag in enumerate((ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo), start=1):
            with contextlib.suppress(Exception):
                found[number] = dict(exif.get_ifd(tag))
    return found[0], found[1], found[2]


def _date(value: object) -> str:
    """2021:05:03 14:22:10 as 2021-05-03T14:22:10, without a time that no clock shows; "" for no date."""
    match = _DATE.match(_text(value))
    if match is None:
        return ""
    year, month, day, *time = (int(one or 0) for one in match.groups())
    try:
        date = datetime(year, month, day)
    except ValueError:
        return ""
    if year < FIRST_YEAR:
        return ""
    if match[4]:
        with contextlib.suppress(ValueError):
            return date.replace(hour=time[0], minute=time[1], second=time[2]).isoformat()
    return date.date().isoformat()


def camera(make: str, model: str) -> str:
    """Apple, iPhone 13 -> Apple iPhone 13; NIKON CORPORATION, NIKON D750 -> NIKON D750."""
    names = {word.casefold() for word in make.split()}
    is_named = bool(model) and model.split()[0].casefold() in names
    return (model if is_named else f"{make} {model}").strip()[:MAX_CAMERA_CHARS].rstrip()


def _text(value: object) -> str:
    """What a tag says in letters, on one line; Pillow reads bytes as Latin-1, where a phone may have meant UTF-8."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return ""
    value = value[: 16 * MAX_CAMERA_CHARS].partition("\0")[0]
    with contextlib.suppress(UnicodeError):
        value = value.encode("latin-1").decode("utf-8")
    return " ".join("".join(one if one.isprintable() else " " for one in value).split())


def _degrees(tags: Tags, tag: int, signs: str, most: int) -> float | None:
    """Degrees, minutes and seconds as one number, with the sign of the tag before."""
    sign, values = _text(tags.get(tag - 1))[:1].upper(), tags.get(tag)
    parts = values if isinstance(values, tuple) else (values,)
    try:
        numbers = [float(one) for one in parts]
    except (TypeError, ValueError, ArithmeticError):
        return None
    if sign not in signs or not sign or not 1 <= len(numbers) <= 3:
        return None
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or max(numbers[1:], default=0) > 60:
        return None
    degrees = math.fsum(number / math.pow(60, place) for place, number in enumerate(numbers))
    if degrees > most:
        return None
    return round(-degrees if sign == signs[1] else degrees, _DECIMALS)
