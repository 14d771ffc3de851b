"""Frames of a video, one after the other: at changes of scene, and at least every so many seconds. Needs `av`.

libav runs in this process, without a bound on what a hostile file might do to it: on files of the user's own folders
only, never on what a request brings. It is given the opened file and no name, so that no name is read as an address.
"""

# H, W height and width, N pixels

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cn_clip import extras
from cn_clip.data.facts import camera
from cn_clip.errors import DataError

Histogram: TypeAlias = NDArray[np.float64]

# By libav's names of them. No playlists: those of HLS name other files and addresses, which libav would open.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,h263,h264,hevc,ogg,dv,rm"
# What a frame is made smaller to: enough for thumbnails and for the input of every model.
LONGEST_SIDE = 1024
# Frames of one video at most, and how far apart they are at least.
MAX_FRAMES, LEAST_SECONDS = 400, 1.0
# By the clock, for one video, without the time that its frames are used elsewhere.
MAX_SECONDS = 300.0
# A damaged packet is passed over; so many of them in a row end the video.
MAX_FAULTS = 100
# Pixels of a frame at most: 8K is 33 million.
MAX_PIXELS = 40_000_000
# A scene changes where this share of the pixels has moved to other bins of colour; it is measured on a small copy.
CHANGED_SHARE, COPY_SIDE, BINS = 0.4, 32, 8
BUFFER_BYTES = 1 << 18
# The flag of libav for the picture on the sleeve of a piece of music.
_ATTACHED_PICTURE = 0x400

_PLACE = re.compile(r"([+-]\d+(?:\.\d+)?)([+-]\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Frame:
    """A frame, upright, of at most `LONGEST_SIDE` a side. seconds: from the start of the video, to a hundredth.

    fields: what is known of the video: width and height as it is seen, its date, camera and place where it says them.
    """

    seconds: float
    image: Image.Image
    fields: Mapping[str, Any]


class NoPicturesError(DataError):
    """A video of sound alone."""


class TooLongError(DataError):
    """Reading a video was given up; the frames that came before are right."""


class _Clock:
    """How long a video may still be read; it rests while its frames are used."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS

    @property
    def has_run_out(self) -> bool:
        """Whether the video has taken too long."""
        return time.monotonic() > self._deadline

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Around what is no reading."""
        began = time.monotonic()
        yield
        self._deadline += time.monotonic() - began


def require() -> Any:
    """The package `av`; raises MissingExtraError without it."""
    return extras.require("av", extra="video", purpose="reading videos")


def frames(path: Path, every: float) -> Iterator[Frame]:
    """The first frame, then those at changes of scene, and where none comes for `every` seconds, one all the same.

    They are at least a second apart, and at most `MAX_FRAMES`: in a longer video both intervals grow, so that they
    cover all of it. Only key frames are decoded, unless they are further apart than `every`. Raises DataError for a
    file without pictures, one that cannot be read, and one that takes too long; frames that came before it are right.
    """
    av = require()
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise DataError("the video is empty (0 bytes)")
        try:
            yield from _frames(av, file, every, _Clock())
        except av.error.FFmpegError as error:
            raise DataError(f"the video cannot be read ({error.strerror})") from error
        except (DataError, OSError):
            raise
        except Exception as error:  # of a file with lies in it: no time base, a time outside of all bounds
            raise DataError(f"the video cannot be read ({error})") from error


def _frames(av: Any, file: BinaryIO, every: float, clock: _Clock) -> Iterator[Frame]:
    av.logging.set_level(av.logging.PANIC)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
    with av.open(file, buffer_size=BUFFER_BYTES, container_options=options, metadata_errors="replace") as container:
        stream = next((one for one in container.streams.video if not one.disposition.value & _ATTACHED_PICTURE), None)
        if stream is None:
            if container.streams.audio:
                raise NoPicturesError("holds sound but no pictures")
            raise DataError("the video is damaged or cut short")
        if stream.codec_context is None:
            raise DataError("the video is of a kind that libav cannot decode")
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise DataError(f"its frames have more than {MAX_PIXELS // 10**6} million pixels")
        # libav's own threads call into Python when they log: closing a video half read then waits for ever (av 15).
        stream.thread_type = "NONE"
        gap = max(LEAST_SECONDS, float(container.duration or 0) / av.time_base / MAX_FRAMES)
        known, count = _known(container.metadata), 0
        chosen: Histogram | None = None
        taken = 0.0
        for seconds, frame in _decoded(av.error, container, stream, max(every, gap) if every else gap, clock):
            if count and seconds - taken < gap:
                continue
            colours = histogram(frame.reformat(COPY_SIDE, COPY_SIDE, "rgb24").to_ndarray())
            is_due = every and seconds - taken >= max(every, gap)
            if chosen is not None and not is_due and changed_share(chosen, colours) < CHANGED_SHARE:
                continue
            chosen, taken, count = colours, seconds, count + 1
            width, height, image = _upright(frame, stream.sample_aspect_ratio)
            with clock.resting():
                yield Frame(round(seconds, 2), image, {"width": width, "height": height, **known})
            if count >= MAX_FRAMES:
                return
        if not count:
            raise DataError("the video is damaged: none of its frames can be decoded")


def _decoded(errors: Any, container: Any, stream: Any, longest: float, clock: _Clock) -> Iterator[tuple[float, Any]]:
    """(seconds, frame): key frames, and from the first gap of more than `longest` seconds between them, all frames."""
    unit, start = float(stream.time_base), stream.start_time or 0
    stream.codec_context.skip_frame = "NONKEY"
    key, last, faults, is_sparse = 0.0, -1.0, 0, False
    packets = container.demux(stream)
    while (packet := next(packets, None)) is not None:
        if clock.has_run_out:
            raise TooLongError(f"takes longer than {MAX_SECONDS:.0f} s; its frames up to {last:.0f} s are indexed")
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None and not is_sparse:
            at = (stamp - start) * unit
            if packet.is_keyframe:
                key = at
            elif at - key <= longest:
                continue
            else:  # back to the key frame, and on with every frame
                is_sparse = True
                stream.codec_context.skip_frame = "DEFAULT"
                container.seek(int(key / unit) + start, stream=stream)
                packets = container.demux(stream)
                continue
        try:
            decoded, faults = packet.decode(), 0
        except errors.EOFError:
            return
        except errors.FFmpegError:
            decoded, faults = [], faults + 1
            if faults > MAX_FAULTS:
                return
        for frame in decoded:
            seconds = last if frame.pts is None else max(0.0, (frame.pts - start) * float(frame.time_base))
            if seconds > last:
                last = seconds
                yield seconds, frame


def histogram(picture_HW3: NDArray[np.uint8]) -> Histogram:
    """The share of the pixels in each of `BINS` bins of red, green and blue (3, BINS)."""
    pixels_N3 = picture_HW3.reshape(-1, 3) // (256 // BINS)
    shares: Histogram = np.stack([np.bincount(bins_N, minlength=BINS) for bins_N in pixels_N3.T]) / len(pixels_N3)
    return shares


def changed_share(one: Histogram, other: Histogram) -> float:
    """The least share of the pixels that must have moved to other bins, mean of the three colours; 0 to 1.

    From all black to all red: every pixel moves in red, none in green and blue: 1/3. From black to white: 1.
    A pan over one scene moves pixels, hardly the histogram; a cut to another scene moves both.
    """
    return float(np.abs(one - other).sum(axis=1).mean() / 2)


def _upright(frame: Any, aspect: Any) -> tuple[int, int, Image.Image]:
    """(width, height, smaller picture) as the video is seen: pixels square, turned as the phone was held."""
    width, height = frame.width, frame.height
    if aspect and 0.1 < aspect < 10:
        width = max(1, round(width * float(aspect)))
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    small = frame.reformat(max(1, round(width * scale)), max(1, round(height * scale)), "rgb24", interpolation="AREA")
    image, turned = Image.fromarray(small.to_ndarray()), round(frame.rotation / 90) % 4 * 90
    if turned % 180:
        width, height = height, width
    return width, height, image.rotate(turned, expand=True) if turned else image


def _known(tags: Mapping[str, str]) -> dict[str, Any]:
    """What the tags of phones say: `date`, local as in pictures, `camera`, `latitude` and `longitude`."""
    found: dict[str, Any] = {}
    apple = "com.apple.quicktime."
    if date := _date(tags.get(f"{apple}creationdate", "")) or _date(tags.get("creation_time", ""), is_utc=True):
        found["date"] = date
    for make, model in ((f"{apple}make", f"{apple}model"), ("com.android.manufacturer", "com.android.model")):
        if tags.get(model):
            found["camera"] = camera(*(" ".join(tags.get(one, "").split()) for one in (make, model)))
    place = _PLACE.match(tags.get(f"{apple}location.ISO6709") or tags.get("location") or "")
    if place and abs(float(place[1])) <= 90 and abs(float(place[2])) <= 180:
        found["latitude"], found["longitude"] = float(place[1]), float(place[2])
    return found


def _date(text: str, *, is_utc: bool = False) -> str:
    """As the fields of pictures; "" for what is no date, or one of a clock that was never set."""
    try:
        found = datetime.fromisoformat(re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", text.strip().replace("Z", "+00:00")))
        if found.year < 1990:  # clocks of the containers start in 1904 and 1970
            return ""
        return (found.astimezone() if is_utc else found).replace(tzinfo=None).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # no date, or one that no clock of this zone shows
        return ""
