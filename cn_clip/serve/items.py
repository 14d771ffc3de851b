"""What people get of an item over HTTP: its metadata without what says where it lies, its small pictures, its file.

A file is read only if the index names it; the request gives nothing but the id.
"""

import contextlib
import hashlib
import io
import os
import stat
import weakref
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from starlette.requests import Request

from cn_clip.clip.picture_names import (
    HEAD_BYTES,
    LARGEST_PICTURE,
    SUFFIXES_OF,
    VIDEO_SUFFIXES,
    begins_as_picture,
    suffix_of,
)
from cn_clip.clip.pictures import opened
from cn_clip.clip.thumbnails import QUALITY
from cn_clip.data.paths import readable
from cn_clip.retrieval.conditions import ID_FIELDS
from cn_clip.serve.schemas import RefusalError

# --- metadata

# How the commands find an item again: these say where it lies on this machine.
BOOKKEEPING = frozenset({"source", "path", "size", "mtime_ns", "digest", "table_fields"})
# Of these, what a condition would find out; by `path` it names the id.
UNTOLD = BOOKKEEPING.difference(ID_FIELDS)


def told(metadata: Mapping[str, Any], *, all_of_it: bool) -> dict[str, Any]:
    """The metadata as JSON holds them, without `BOOKKEEPING` unless `all_of_it` is asked for."""
    # Indexes of before hold names as they lie on the disk.
    kept: dict[str, Any] = readable(
        {name: one for name, one in metadata.items() if all_of_it or name not in BOOKKEEPING}
    )
    return kept


# --- small pictures

Size: TypeAlias = Literal["small", "medium", "large"]
# The longest side; None: as it is kept.
SIDES: Mapping[Size, int | None] = {"small": 160, "medium": 320, "large": None}


def etag_of(data: bytes, size: Size) -> str:
    """What tells a small picture from another."""
    return f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}-{size}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has what bears this tag, so that the answer is 304."""
    known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return etag in known or known == ["*"]


def made_smaller(data: bytes, size: Size) -> bytes:
    """The JPEG of at most so many pixels a side; one that is no larger, or that cannot be read, as it is."""
    side = SIDES[size]
    try:
        with opened(data) as image:
            if side is None or max(image.size) <= side:
                return data
            image.thumbnail((side, side))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=QUALITY)
            return stream.getvalue()
    except Exception:  # what PIL's plugins raise has no common type
        return data


# --- files

# By PIL's name of the format; what browsers cannot show is saved by them.
_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
    "JPEG2000": "image/jp2",
    "HEIF": "image/heif",
}
OTHER = "application/octet-stream"
MEDIA_TYPES = {suffix: _TYPES.get(kind, OTHER) for kind, suffixes in SUFFIXES_OF.items() for suffix in suffixes}
# Of a frame, its whole video: a browser plays it from the second of the frame on.
_VIDEOS = {".mov": "quicktime", ".m4v": "mp4", ".mkv": "x-matroska", ".3gp": "3gpp", ".3g2": "3gpp2", ".mpg": "mpeg"}
_VIDEOS |= {".mts": "mp2t", ".m2ts": "mp2t", ".avi": "x-msvideo", ".wmv": "x-ms-wmv"}
MEDIA_TYPES |= {suffix: f"video/{_VIDEOS.get(suffix, suffix[1:])}" for suffix in VIDEO_SUFFIXES}
# Where an open file can be opened again by its number; Windows has no such names.
_DESCRIPTORS = "/dev/fd"
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


class Original:
    """An open file of an item. `close` is called at the latest when nobody has it any more."""

    def __init__(self, descriptor: int, path: str, name: str) -> None:
        self.close = weakref.finalize(self, os.close, descriptor)
        self.name, self.facts = readable(name), os.fstat(descriptor)
        self.media_type = _media_type(name, descriptor)
        # Opened again by its number it is the same file, whatever its folder has under the old name by then.
        self.path = f"{_DESCRIPTORS}/{descriptor}" if os.path.isdir(_DESCRIPTORS) else path
        # Of the JPEG that is made of it.
        self.jpeg_etag = f'"{self.facts.st_mtime_ns:x}-{self.facts.st_size:x}-jpeg"'
        self._descriptor = descriptor

    def read(self) -> bytes:
        """The bytes of a picture, once, then it is closed; raises RefusalError (400) for more than an index takes."""
        try:
            with open(self._descriptor, "rb", closefd=False) as stream:
                data = stream.read(LARGEST_PICTURE + 1)
        except OSError as error:
            raise _no_original("its file cannot be read") from error
        finally:
            self.close()
        if len(data) > LARGEST_PICTURE:
            message = f"id: its file has more than {LARGEST_PICTURE >> 20} MiB"
            raise RefusalError(400, message, param="id", code="image_too_large")
        return data

    def check_picture(self) -> None:
        """Raises RefusalError (400) for a video."""
        if self.media_type.startswith("video/"):
            message = "as: a video is given only as it is; its thumbnail is a picture"
            raise RefusalError(400, message, param="as", code="invalid_value")


def has_original(metadata: Mapping[str, Any]) -> bool:
    """Whether the index says where the file of an item is, in the folder that was indexed.

    That of an item of feature shards lies elsewhere.
    """
    path, source = metadata.get("path"), metadata.get("source")
    return isinstance(path, str) and isinstance(source, str) and path.startswith(os.path.join(source, ""))


def open_original(metadata: Mapping[str, Any]) -> Original:
    """The file that an item was made of; raises RefusalError (404).

    It must lie in the folder that was indexed, also once links are followed, and be a regular file of a known kind.
    """
    if not has_original(metadata):
        raise _no_original("the index does not name a file for this item")
    path, source = os.path.realpath(metadata["path"]), os.path.realpath(metadata["source"])
    name = os.path.basename(metadata["path"])
    try:
        if os.path.commonpath([path, source]) != source or path == source:
            raise _no_original("its file is a link that leaves the folder that was indexed")
        descriptor = _open_below(source, os.path.relpath(path, source).split(os.sep))
    except (OSError, ValueError) as error:
        raise _no_original("its file is not there any more, or cannot be read") from error
    found = Original(descriptor, path, name)
    if not stat.S_ISREG(found.facts.st_mode) or not found.media_type:
        raise _no_original("its file is not a picture or a video any more")
    return found


def _open_below(folder: str, names: list[str]) -> int:
    """A descriptor of the file that `names` lead to, no link among them; raises OSError."""
    if os.open not in os.supports_dir_fd:  # Windows
        return os.open(os.path.join(folder, *names), _FLAGS)
    at = os.open(folder, _FLAGS | os.O_DIRECTORY)
    for position, name in enumerate(names):
        try:
            following = os.open(name, _FLAGS | (os.O_DIRECTORY if position < len(names) - 1 else 0), dir_fd=at)
        finally:
            os.close(at)
        at = following
    return at


def _media_type(name: str, descriptor: int) -> str:
    """What browsers call it; "" for what is neither picture nor video."""
    if suffix := suffix_of(name):
        return MEDIA_TYPES.get(suffix, "")
    with contextlib.suppress(OSError):  # a folder
        head = os.read(descriptor, HEAD_BYTES)
        os.lseek(descriptor, 0, os.SEEK_SET)  # on macOS, the file opened again goes on from there
        return OTHER if begins_as_picture(head) else ""
    return ""


def _no_original(reason: str) -> RefusalError:
    return RefusalError(404, f"id: there is no original: {reason}", param="id", code="original_not_found")
