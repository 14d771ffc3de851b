"""Pictures from paths, data URLs, bytes, open files, PIL or arrays, decoded by threads ahead of the computing."""

# B batch, R resolution

import base64
import contextlib
import functools
import io
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from cn_clip.clip.backends.base import AnyPixels
from cn_clip.clip.decoding import ProcessStartError, opened_elsewhere
from cn_clip.clip.orientation import upright as turned_upright
from cn_clip.clip.picture_arrays import as_picture, is_array
from cn_clip.clip.picture_files import is_bounded, look, opened_here, prepare
from cn_clip.clip.picture_names import begins_as_picture
from cn_clip.errors import DataError
from cn_clip.processes import usable_cores

if TYPE_CHECKING:
    import torch

# A path or a data URL, encoded bytes, an open file of them, or a picture in memory, see `as_picture`.
Encoded: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
Picture: TypeAlias = "Encoded | Image | NDArray[Any] | torch.Tensor"
Pictures: TypeAlias = "Iterable[Picture] | Picture"
# From a number of pictures to memory for their pixels (B, 3, R, R), yet to be written.
Room: TypeAlias = Callable[[int], AnyPixels]
T = TypeVar("T")
ItemT = TypeVar("ItemT")
logger = logging.getLogger(__name__)

# Base64 that is decoded at once, 1 ms in which no other thread runs; a multiple of 4.
_BASE64_CHARS = 1 << 18
# Enough of it for `begins_as_picture`, and of a string to tell it from a word. The smallest GIF has 48 characters.
_BASE64_HEAD_CHARS, _BASE64_HEAD = 24, re.compile(r"[A-Za-z0-9+/]{40}")
# Of those that decode, unless their number is given: more are not kept busy by what reads the files and the bytes.
MOST_THREADS = 16
# Batches that are decoded, or being decoded, before the one in use is done.
BATCHES_AHEAD = 2
# A picture opened lazily is read once, also when several threads ask; others are read at the same time, but for chance.
_LOADING = [threading.Lock() for _ in range(61)]


def is_data_url(text: str) -> bool:
    """Whether a string holds a picture itself, as data:image/png;base64,…, which nobody means as words or as a path."""
    return text[:11].lower() == "data:image/"


def is_base64_picture(text: str) -> bool:
    """Whether a string holds a picture itself as base64 alone: nobody's words begin as a picture does, unbroken."""
    return _BASE64_HEAD.match(text) is not None and begins_as_picture(base64.b64decode(text[:_BASE64_HEAD_CHARS]))


def holds_picture(text: str) -> bool:
    """Whether a string is a picture, as a data URL or as base64 alone."""
    return is_data_url(text) or is_base64_picture(text)


def data_url_bytes(url: str, between: Callable[[bytes], object] = lambda _: None) -> bytes:
    """The bytes in a data URL; raises DataError for one that is not of base64.

    between: called between the pieces of a long one, with the piece before; what it raises ends the reading.
    """
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError("the data URL is not in base64")
    last, pieces = max(len(payload) - 1, 0) // _BASE64_CHARS * _BASE64_CHARS, list[bytes]()
    for start in range(0, last + 1, _BASE64_CHARS):
        if start > 0:
            between(pieces[-1])
        piece = payload[start : start + _BASE64_CHARS]
        try:
            if start < last and "=" in piece:
                raise ValueError("padding before the end")
            pieces.append(base64.b64decode(piece, validate=True))
        except ValueError as error:
            raise DataError(f"not valid base64 ({error})") from error
    return b"".join(pieces)


def opened(data: bytes, draft_size: int | None = None) -> Image:
    """The picture with its head read; every picture file that the package reads comes through here.

    A file whose cost its head bounds is not decoded yet. Any other one is decoded by a process that is killed when it
    takes too long (see `decoding`), and comes back loaded; draft_size: as of `decode`, of the JPEG in a RAW file.
    Raises DataError for a file that has too many pixels, or takes far longer than its pixels, and what Pillow's plugins
    raise: UnidentifiedImageError for a format that is not one of `picture_files.FORMATS`, and others.
    """
    head = look(data)
    if is_bounded(data, head):
        return opened_here(data, head)
    try:
        return opened_elsewhere(data, draft_size)
    except ProcessStartError as error:
        _say_unwatched(str(error))
        return opened_here(data, head)


@functools.cache
def _say_unwatched(reason: str) -> None:
    logger.warning("pictures are decoded without a bound on their time: %s", reason)


def decode(picture: str | Path | bytes, draft_size: int | None = None, *, upright: bool = False) -> Image:
    """The loaded picture of a file or of encoded bytes, mode and size as there; the first frame of an animation.

    draft_size: decodes a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest whose sides are both at least so long.
    upright: turns it by its EXIF orientation, as people see it.
    Raises what `opened` raises, and OSError, SyntaxError, ValueError, struct.error, IndexError and others.
    """
    with opened(picture if isinstance(picture, bytes) else Path(picture).read_bytes(), draft_size) as image:
        prepare(image, draft_size)
        image.load()
    return turned_upright(image) if upright else image


def open_picture(picture: Picture, *, name: str, draft_size: int | None = None, upright: bool = False) -> Image:
    """A loaded PIL picture from a path, a data URL, encoded bytes or an open file (see `decode`), PIL or an array.

    An open file is read from its beginning, as PIL does, if it can be set to it, and stays open.
    Raises DataError saying `name` when it cannot be decoded, TypeError for any other kind of object.
    """
    try:
        if is_array(picture):
            picture = as_picture(picture)
        elif not isinstance(picture, (str, bytes, Image)):
            picture = _plain(picture, name)
        if isinstance(picture, str) and is_data_url(picture):
            picture = data_url_bytes(picture)
        if isinstance(picture, Image):
            with _LOADING[id(picture) % len(_LOADING)]:
                picture.load()
                return turned_upright(picture) if upright else picture
        return decode(picture, draft_size, upright=upright)
    except FileNotFoundError as error:
        if re.match(r"https?://", str(picture)):
            raise DataError("is an address; nothing is downloaded here, give the file or its bytes", at=name) from error
        raise DataError("no such file", at=name) from error
    except DataError as error:
        raise DataError(error if is_array(picture) else f"not decoded: {error}", at=name) from error
    except _KindError:
        raise
    except Exception as error:
        raise DataError(f"not a picture that can be decoded ({error})", at=name) from error


class _KindError(TypeError):
    """An object that is no picture of any kind."""


def _plain(picture: object, name: str) -> bytes | Path:
    """The bytes or the path of what is neither str, bytes, PIL nor an array; raises _KindError."""
    if isinstance(picture, os.PathLike):
        return Path(picture)
    if isinstance(picture, (bytearray, memoryview)):
        return bytes(picture)
    if not hasattr(picture, "read"):
        kind = type(picture).__name__
        expected = "a path, encoded bytes, an open file, a PIL picture, an array or a tensor"
        raise _KindError(f"{name}: expected {expected}, got {kind}")
    file = cast("IO[bytes]", picture)
    with _LOADING[id(picture) % len(_LOADING)]:
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            file.seek(0)
        data: object = file.read()
    if isinstance(data, str):
        raise _KindError(f"{name}: the file was opened as text; open it with mode 'rb'")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise _KindError(f"{name}: reading the file gave {type(data).__name__}, expected bytes")
    return bytes(data)


def pictures_of(images: Pictures) -> Iterator[Picture]:
    """The pictures one by one, of one picture itself; nothing is read before it is asked for.

    An array or tensor of up to three axes is one picture, of more a batch of them along the first.
    Raises TypeError for what holds no pictures in an order.
    """
    alone = (str, os.PathLike, bytes, bytearray, memoryview, Image)
    if isinstance(images, alone) or hasattr(images, "read") or (is_array(images) and len(images.shape) <= 3):
        return iter([cast("Picture", images)])
    if isinstance(images, (Mapping, Set)):
        raise TypeError(f"images: expected pictures in an order, got {type(images).__name__}; give a list")
    try:
        return iter(cast("Iterable[Picture]", images))
    except TypeError:
        raise TypeError(f"images: expected a picture, or several, got {type(images).__name__}") from None


def picture_name(picture: Picture, number: int) -> str:
    """How messages call a picture: by its path, or the file it was opened from, else by its number, from 0."""
    if isinstance(picture, str):
        return f"picture {number}" if is_data_url(picture) else picture
    if isinstance(picture, os.PathLike):
        return os.fspath(picture)
    file = getattr(picture, "name", None) if hasattr(picture, "read") else None
    return file if isinstance(file, str) and file else f"picture {number}"


def decoding_threads(cores: int) -> int:
    """How many threads decode where no number is given."""
    return min(MOST_THREADS, cores)


def decoded_batches(
    load: Callable[[ItemT, AnyPixels], T],
    items: Iterable[ItemT],
    room: Room,
    batch_size: int,
    num_threads: int | None,
) -> Iterator[tuple[list[T], AnyPixels]]:
    """(what `load` returned, pixels (B, 3, R, R)) of `items`, the last batch shorter, made ahead by threads.

    items: taken one batch after the other, at most BATCHES_AHEAD + 1 batches before their rows are computed.
    load: takes an item and the (3, R, R) to write its pixels into; called by several threads at once. PIL and NumPy
    work without Python's global lock, so threads do what processes would. num_threads 0: loads in this thread; None:
    one a core, at most MOST_THREADS.
    room: memory for the pixels of so many pictures. An error of `load` is raised when its batch is due.
    """
    source = iter(items)
    batches = iter(lambda: list(islice(source, batch_size)), [])
    if num_threads is None:
        num_threads = decoding_threads(usable_cores())
    if num_threads == 0:
        for batch in batches:
            pixels = room(len(batch))
            yield list(map(load, batch, pixels)), pixels
        return
    waiting: deque[tuple[list[Future[T]], AnyPixels]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for batch in batches:
                pixels = room(len(batch))
                waiting.append(([pool.submit(load, *item) for item in zip(batch, pixels, strict=True)], pixels))
                if len(waiting) > BATCHES_AHEAD:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def float_room(shape: tuple[int, ...]) -> Room:
    """Memory for normalised pixels, of this shape a picture."""
    return lambda count: np.empty((count, *shape), dtype=np.float32)


def _finished(batch: tuple[list[Future[T]], AnyPixels]) -> tuple[list[T], AnyPixels]:
    futures, pixels = batch
    return [future.result() for future in futures], pixels
