"""Pictures that strangers send: from a data URL to bytes, bounded by what they declare, and to pixels in a process.

What one picture does to its process, no other one notices.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cn_clip.clip.backends.base import AnyPixels, PixelType
from cn_clip.clip.decoding import (
    DECODE_BYTES,
    DECODE_BYTES_PER_PIXEL,
    DECODE_SECONDS,
    JPEG,
    PIXELS,
    TOO_LARGE,
    AnswerType,
    DecodingProcess,
    ProcessClosedError,
    ProcessEndedError,
    ProcessStartError,
)
from cn_clip.clip.picture_files import Head, look, look_at_start, num_decoded
from cn_clip.clip.picture_names import SUFFIXES_OF
from cn_clip.clip.pictures import data_url_bytes, is_base64_picture
from cn_clip.clip.thumbnails import SmallJpeg
from cn_clip.clip.transforms import PictureTransform, shape_of
from cn_clip.errors import DataError
from cn_clip.serve.limits import Limits
from cn_clip.serve.schemas import RefusalError, stopping

log = logging.getLogger(__name__)

# For a process to be ready; those of models that come with code of their own import a lot.
START_SECONDS = 60.0
# As they leave a process.
_DTYPES: dict[PixelType, np.dtype[np.float32 | np.uint8]] = {"float32": np.dtype("<f4"), "uint8": np.dtype(np.uint8)}
# Texts go before pictures on a full machine, and pictures go on beside other programs.
_NICE = 10


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture that was looked at; `param` names the field it came in, for errors.

    num_pixels: how many are decoded, at most, as far as its head says.
    """

    data: bytes
    head: Head
    param: str
    num_pixels: int = 0


class Decoders:
    """At most `count` processes, for one event loop, each with a thread that waits for it.

    max_bytes: of an encoded picture; None: of a request.
    """

    def __init__(self, count: int, limits: Limits, *, max_bytes: int | None = None) -> None:
        self.count, self._limits = count, limits
        self._max_bytes = limits.max_body_bytes if max_bytes is None else max_bytes
        self._threads = ThreadPoolExecutor(count, "decode")
        self._free = asyncio.Semaphore(count)
        self._workers, self._idle = list[_Worker](), list[_Worker]()
        self._busy_since: dict[_Worker, float] = {}

    async def open(
        self, transform: PictureTransform, pixel_type: PixelType = "float32", *, upright: bool = False
    ) -> None:
        """Has the processes make pixels; before the first picture, returns when they run, or cannot."""
        self._shape, self._dtype = shape_of(transform), _DTYPES[pixel_type]
        self._num_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._set_up(transform, pixel_type, upright=upright, num_bytes=self._num_bytes)
        await asyncio.gather(*[self._with_a_worker(_Worker.start) for _ in range(self.count)])

    def open_for_jpegs(self, side: int) -> None:
        """Has the processes make JPEGs of at most `side` pixels a side; each is started with its first picture."""
        self._set_up(SmallJpeg(side), "jpeg", num_bytes=3 * side * side)

    def _set_up(self, transform: PictureTransform | SmallJpeg, pixel_type: AnswerType, **given: Any) -> None:
        max_pixels = self._limits.max_pixels
        given["spare_bytes"] = DECODE_BYTES + self._max_bytes + DECODE_BYTES_PER_PIXEL * max_pixels
        processes = [
            DecodingProcess(transform, pixel_type=pixel_type, niceness=_NICE, **given) for _ in range(self.count)
        ]
        self._workers = [_Worker(process, max_pixels) for process in processes]
        self._idle = list(self._workers)

    async def pixels(self, picture: EncodedPicture) -> AnyPixels:
        """The pixels (3, R, R) of the first frame; raises RefusalError naming its field.

        400: it does not decode, or not with the time and memory that a picture has. 503: no process can be started.
        """
        data = await self._answer(PIXELS, picture)
        if len(data) != self._num_bytes:
            raise undecodable("its decoder gave what it should not", picture.param)
        pixels: AnyPixels = np.frombuffer(data, dtype=self._dtype).reshape(self._shape)
        return pixels

    async def jpeg(self, picture: EncodedPicture) -> bytes:
        """The small JPEG of the first frame, upright; raises RefusalError as `pixels`."""
        return await self._answer(JPEG, picture)

    async def _answer(self, kind: int, picture: EncodedPicture) -> bytes:
        outcome = await self._with_a_worker(lambda worker: worker.decode(picture, kind))
        if isinstance(outcome, RefusalError):
            raise outcome
        assert outcome is not None
        return outcome

    def kill(self) -> None:
        """Kills the processes; may be called by any thread."""
        for worker in self._workers:
            worker.process.close()

    def close(self) -> None:
        """Kills the processes, and ends the threads."""
        self.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.reap()

    def check_moving(self, now: float) -> None:
        """Raises RefusalError (503) while pictures cannot be decoded; `now`: time of the event loop."""
        if any(worker.has_failed for worker in self._workers):
            if self._idle:  # that it may be seen when one can be started again
                starting = asyncio.ensure_future(self._with_a_worker(_Worker.start))
                starting.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise _unavailable()
        is_full = len(self._busy_since) == self.count
        if is_full and now - max(self._busy_since.values()) > 2 * self._limits.timeout:
            raise RefusalError(503, "no picture has been decoded for a long time", code="stalled", retry_after=5)

    async def _with_a_worker(
        self, function: "Callable[[_Worker], bytes | RefusalError | None]"
    ) -> bytes | RefusalError | None:
        """What `function` gives in a thread."""
        await self._free.acquire()
        loop, worker = asyncio.get_running_loop(), self._idle.pop()
        self._busy_since[worker] = loop.time()
        # Its processor time is bounded by the system; this is for one that does not compute, and for Windows.
        seconds = self._limits.timeout + (0 if worker.process.is_running else START_SECONDS)
        deadline = loop.call_later(seconds, worker.process.kill)

        def give_back(_: object) -> None:
            deadline.cancel()
            del self._busy_since[worker]
            self._idle.append(worker)
            self._free.release()

        call = loop.run_in_executor(self._threads, function, worker)
        call.add_done_callback(give_back)
        # Who leaves does not take the process along: starting another would cost more than most pictures.
        return await asyncio.shield(call)


class _Worker:
    """One process, and what requests are told of it."""

    def __init__(self, process: DecodingProcess, max_pixels: int) -> None:
        self.process, self.max_pixels, self.has_failed = process, max_pixels, False

    def start(self) -> RefusalError | None:
        """Has the process running, and waits until it is ready; returns why it cannot be."""
        try:
            self.process.start()
        except ProcessStartError as error:
            log.error("%s", error)
            self.has_failed = True
            return _unavailable()
        except ProcessClosedError:
            return stopping()
        self.has_failed = False
        return None

    def decode(self, picture: EncodedPicture, wanted: int) -> bytes | RefusalError:
        """An answer of the kind that is wanted, or why there is none."""
        if (refusal := self.start()) is not None:
            return refusal
        try:
            kind, data = self.process.ask(picture.data, DECODE_SECONDS, self.max_pixels)
        except ProcessClosedError:
            return stopping()
        except ProcessEndedError as error:
            log.warning("%s: a decoding process was ended: %s", picture.head, error)
            return undecodable(error, picture.param)
        if kind == wanted:
            return data
        sentence = data.decode(errors="replace")
        if kind == TOO_LARGE:
            return too_large(sentence, picture.param, self.max_pixels)
        return undecodable(sentence, picture.param)


def undecodable(reason: object, param: str) -> RefusalError:
    """400: the picture in the field `param` cannot be decoded."""
    return RefusalError(400, f"{param}: the picture does not decode ({reason})", param=param, code="invalid_image")


def too_large(size: str, param: str, max_pixels: int) -> RefusalError:
    """400: the picture in the field `param` has more pixels than one may have."""
    message = f"{param}: at most {max_pixels} pixels a picture are read, this one has {size}"
    return RefusalError(400, message, param=param, code="image_too_large")


def _unavailable() -> RefusalError:
    message = "no process can be started that decodes pictures; the server's log tells why"
    return RefusalError(503, message, code="decoders_unavailable", retry_after=5)


# --- from a data URL to bytes

_NAMES = ", ".join(SUFFIXES_OF)
_EXPECTED = f'expected "data:image/png;base64,…" ({_NAMES}) with the picture itself'
_SHOWN_CHARS = 40
# A picture whose head does not say its size, such as RAW, counts as such a part of the largest.
_UNKNOWN = 4


def picture_bytes(source: str | bytes, param: str, give_way: Callable[[], object] = lambda: None) -> bytes:
    """The bytes in a data URL, or in the base64 of a picture; raises RefusalError (400) naming `param`.

    Addresses and paths are never followed.

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

    if isinstance(source, bytes):
        return source
    data_url = f"data:;base64,{source}" if is_base64_picture(source) else source
    if not data_url[:5].lower() == "data:":
        raise _invalid(f"{param}: no URL or path is read, got {data_url[:_SHOWN_CHARS]!a}; {_EXPECTED}", param)
    try:
        return data_url_bytes(data_url, between)
    except DataError as error:
        raise _invalid(f"{param}: {error}; {_EXPECTED}", param) from error


def looked_at(data: bytes, param: str, *, max_pixels: int, draft_size: int | None = None) -> EncodedPicture:
    """The picture with its head read and nothing decoded; raises RefusalError (400) naming `param`, and the bound.

    draft_size: the side that remains of a JPEG which is decoded at a fraction of its size.
    """
    with _named(param):
        head = look(data)
    if head is None:
        raise _invalid(f"{param}: {len(data)} bytes of no known format; expected {_NAMES}", param)
    num_pixels = num_decoded(head, draft_size)
    if num_pixels > max_pixels:
        raise too_large(f"{head.width} x {head.height}", param, max_pixels)
    return EncodedPicture(data, head, param, num_pixels or max_pixels // _UNKNOWN)


@contextlib.contextmanager
def _named(param: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise undecodable(error, param) from error


def _invalid(message: str, param: str) -> RefusalError:
    return RefusalError(400, message, param=param, code="invalid_image")
