"""Pictures that strangers send: from a data URL to bytes that a decoder may see, bounded by what they declare."""

import contextlib
from collections.abc import Callable, Iterator

from cn_clip.clip.picture_files import look, look_at_start
from cn_clip.clip.pictures import data_url_bytes
from cn_clip.errors import DataError
from cn_clip.serve.decoders import EncodedPicture, too_large, undecodable
from cn_clip.serve.refusals import RefusalError

# Those that `look` reads.
_NAMES = "JPEG, PNG, WebP, GIF or BMP"
_EXPECTED = f'expected "data:image/png;base64,…" ({_NAMES}) with the picture itself'
_SHOWN_CHARS = 40


def picture_bytes(data_url: str, param: str, give_way: Callable[[], object] = lambda: None) -> bytes:
    """The bytes in a data URL; raises RefusalError (400) naming `param`. Addresses and paths are never followed.

    give_way: called after each millisecond or two of work on a long one.
    """
    is_begun = False

    def between(piece: bytes) -> None:
        nonlocal is_begun
        if not is_begun:
            is_begun = True
            with _named(param):
                look_at_start(piece)
        give_way()

    if not data_url[:5].lower() == "data:":
        raise _invalid(f"{param}: no URL or path is read, got {data_url[:_SHOWN_CHARS]!a}; {_EXPECTED}", param)
    try:
        return data_url_bytes(data_url, between)
    except DataError as error:
        raise _invalid(f"{param}: {error}; {_EXPECTED}", param) from error


def looked_at(data: bytes, param: str, *, max_pixels: int) -> EncodedPicture:
    """The picture with its head read and nothing decoded; raises RefusalError (400) naming `param`, and the bound."""
    with _named(param):
        head = look(data)
    if head is None:
        raise _invalid(f"{param}: {len(data)} bytes of no known format; expected {_NAMES}", param)
    if head.width * head.height > max_pixels:
        raise too_large(f"{head.width} x {head.height}", param, max_pixels)
    return EncodedPicture(data, head, param)


@contextlib.contextmanager
def _named(param: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise undecodable(error, param) from error


def _invalid(message: str, param: str) -> RefusalError:
    return RefusalError(400, message, param=param, code="invalid_image")
