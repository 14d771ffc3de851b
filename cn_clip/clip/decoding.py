"""What a decoding process runs: encoded pictures come by its standard input, pixels leave by its standard output.

`decoding_process` starts such processes. Only what a picture needs is imported: a process starts quickly, and knows
no secret of the program that started it.
"""

import contextlib
import io
import json
import math
import os
import pickle
import signal
import struct
import sys
from typing import TYPE_CHECKING, BinaryIO

from cn_clip.clip.inputs import PictureTransform
from cn_clip.clip.picture_files import opened_here
from cn_clip.clip.picture_heads import look

if TYPE_CHECKING:
    from PIL.Image import Image

# What a process is told first: the bytes of a pickle, those that decoding may take beyond what the process has, and by
# how much its claim to the processors is less than that of others.
SETTINGS = struct.Struct("<QQB")
# A picture: processor seconds besides those for its pixels, most pixels, bytes of the file, which follow.
JOB = struct.Struct("<dQQ")
# What comes back: one of the kinds, and the bytes of what follows: of PIXELS (3, R, R) float32, of PICTURE what
# `unpacked` reads, of REFUSED a sentence and of TOO_LARGE the size, in UTF-8.
ANSWER = struct.Struct("<BQ")
READY, PIXELS, PICTURE, REFUSED, TOO_LARGE = range(5)
MAX_SENTENCE_BYTES = 1000
# Of what describes a picture: larger EXIF is left out.
MAX_FACTS_BYTES, MAX_EXIF_BYTES = 1 << 20, 1 << 18
# Seconds of a processor for a million pixels: five times what a PNG takes.
SECONDS_PER_PIXEL = 0.25e-6
_FACTS = struct.Struct("<I")


def main() -> None:
    """Decodes until its input ends."""
    for name in ("SIGINT", "SIGTERM"):  # these reach a whole group of processes; this one is ended by who started it
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    num_bytes, spare_bytes, niceness = SETTINGS.unpack(requests.read(SETTINGS.size))
    transform: PictureTransform | None = pickle.loads(requests.read(num_bytes))
    _warm(transform)
    _bound_memory(spare_bytes)
    if hasattr(os, "nice"):
        os.nice(niceness)
    _write(answers, READY, b"")
    # Libraries print what they think of a picture.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while len(head := requests.read(JOB.size)) == JOB.size:
        seconds, max_pixels, num_bytes = JOB.unpack(head)
        _write(answers, *answer(requests.read(num_bytes), seconds, max_pixels, transform))


def answer(data: bytes, seconds: float, max_pixels: int, transform: PictureTransform | None) -> tuple[int, bytes]:
    """(a kind, the pixels of the first frame, without a transform the picture, or a sentence about why there are none).

    seconds: of a processor, besides those for the pixels that the file declares; then this process dies.
    """
    try:
        started = _processor_seconds()
        _bound_time(started + seconds)
        with opened_here(data, look(data)) as image:
            num_pixels = image.width * image.height
            if num_pixels > max_pixels:
                return TOO_LARGE, f"{image.width} x {image.height}".encode()
            _bound_time(started + seconds_for(num_pixels, seconds))
            if transform is None:
                image.load()
                return PICTURE, packed(image)
            if transform.draft_size is not None:
                image.draft(None, (transform.draft_size, transform.draft_size))
            image.load()
            return PIXELS, transform.array(image).astype("<f4", copy=False).tobytes()
    except MemoryError:
        return REFUSED, b"it takes too much memory"
    except Exception as error:  # what PIL's plugins raise has no common type
        return REFUSED, _sentence(error).encode(errors="replace")[:MAX_SENTENCE_BYTES]


def seconds_for(num_pixels: int, seconds: float) -> int:
    """Processor seconds that a picture may take, `seconds` of them whatever its size."""
    return math.ceil(seconds + num_pixels * SECONDS_PER_PIXEL)


def packed(image: "Image") -> bytes:
    """A loaded picture as `unpacked` reads it: pixels, palette, transparency and EXIF."""
    palette, transparency, exif = image.palette, image.info.get("transparency"), image.info.get("exif")
    facts = {
        "mode": image.mode,
        "size": image.size,
        "format": image.format,
        "palette": None if palette is None else [palette.mode, image.getpalette(None)],
        "transparency": list(transparency) if isinstance(transparency, (bytes, tuple)) else transparency,
        "exif": exif.hex() if isinstance(exif, bytes) and len(exif) <= MAX_EXIF_BYTES else None,
    }
    head = json.dumps(facts).encode()
    return _FACTS.pack(len(head)) + head + image.tobytes()


def unpacked(data: bytes) -> "Image":
    """The picture that was packed; raises ValueError and others for what was not."""
    from PIL.Image import frombytes

    (num_bytes,) = _FACTS.unpack_from(data)
    facts = json.loads(data[_FACTS.size : _FACTS.size + num_bytes])
    image = frombytes(facts["mode"], tuple(facts["size"]), memoryview(data)[_FACTS.size + num_bytes :])
    image.format = facts["format"]
    if facts["palette"] is not None:
        mode, colours = facts["palette"]
        image.putpalette(colours, mode)
    transparency = facts["transparency"]
    if isinstance(transparency, list):
        transparency = bytes(transparency) if image.mode in ("P", "PA") else tuple(transparency)
    if transparency is not None:
        image.info["transparency"] = transparency
    if facts["exif"] is not None:
        image.info["exif"] = bytes.fromhex(facts["exif"])
    return image


def _sentence(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Pillow's own names an object of Python.
    return "no known picture format" if isinstance(error, UnidentifiedImageError) else str(error)


def _write(answers: BinaryIO, kind: int, data: bytes) -> None:
    answers.write(ANSWER.pack(kind, len(data)))
    answers.write(data)
    answers.flush()


def _warm(transform: PictureTransform | None) -> None:
    """Has all imported that a picture needs."""
    from PIL.Image import new

    for kind in ("JPEG", "PNG"):
        stream = io.BytesIO()
        new("RGB", (8, 8)).save(stream, kind)
        answer(stream.getvalue(), math.inf, 64, transform)


def _bound_memory(spare_bytes: int) -> None:
    """Where the system can (Linux): further memory fails, and with it the one picture."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes,) * 2)


def _processor_seconds() -> float:
    """What this process has used; 0 where the system cannot say."""
    with contextlib.suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    return 0.0


def _bound_time(seconds: float) -> None:
    """Where the system can (not Windows): this process dies once it has computed so long, whoever still watches it."""
    with contextlib.suppress(ImportError, OSError, ValueError, OverflowError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), most))
