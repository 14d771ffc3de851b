"""What a decoding process runs: encoded pictures come by its standard input, pixels leave by its standard output.

`decoders` starts such processes. Nothing of the server is imported here: one starts quickly, and knows no secret.
"""

import contextlib
import io
import os
import pickle
import signal
import struct
import sys
from typing import BinaryIO

from cn_clip.clip.inputs import PictureTransform
from cn_clip.clip.pictures import opened

# What a process is told first: the bytes of a pickle, and those that decoding may take beyond what the process has.
SETTINGS = struct.Struct("<QQ")
# A picture: processor seconds, most pixels, bytes of the file, which follow.
JOB = struct.Struct("<IQQ")
# What comes back: one of the kinds, bytes of what follows: pixels (3, R, R) float32, or a sentence in UTF-8.
ANSWER = struct.Struct("<BQ")
READY, PIXELS, REFUSED, TOO_LARGE = range(4)
MAX_SENTENCE_BYTES = 1000
# Enough that texts go before pictures on a full machine, and little enough that pictures go on beside other programs.
_NICE = 5


def main() -> None:
    """Decodes until its input ends, with less claim to the processors than the server has."""
    for name in ("SIGINT", "SIGTERM"):  # these reach a whole group of processes; the server ends this one itself
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    num_bytes, spare_bytes = SETTINGS.unpack(requests.read(SETTINGS.size))
    transform: PictureTransform = pickle.loads(requests.read(num_bytes))
    _warm(transform)
    _bound_memory(spare_bytes)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    _write(answers, READY, b"")
    # Libraries print what they think of a picture.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while len(head := requests.read(JOB.size)) == JOB.size:
        seconds, max_pixels, num_bytes = JOB.unpack(head)
        data = requests.read(num_bytes)
        _bound_time(seconds)
        _write(answers, *answer(data, max_pixels, transform))


def answer(data: bytes, max_pixels: int, transform: PictureTransform) -> tuple[int, bytes]:
    """(a kind, the pixels of the first frame or a sentence about why there are none)."""
    try:
        with opened(data) as image:
            if image.width * image.height > max_pixels:
                return TOO_LARGE, f"{image.width} x {image.height}".encode()
            if transform.draft_size is not None:
                image.draft(None, (transform.draft_size, transform.draft_size))
            image.load()
            return PIXELS, transform.array(image).astype("<f4", copy=False).tobytes()
    except MemoryError:
        return REFUSED, b"it takes too much memory"
    except Exception as error:  # what PIL's plugins raise has no common type
        return REFUSED, str(error).encode(errors="replace")[:MAX_SENTENCE_BYTES]


def _write(answers: BinaryIO, kind: int, data: bytes) -> None:
    answers.write(ANSWER.pack(kind, len(data)) + data)
    answers.flush()


def _warm(transform: PictureTransform) -> None:
    """Has all imported that a picture needs."""
    from PIL.Image import new

    for kind in ("JPEG", "PNG"):
        stream = io.BytesIO()
        new("RGB", (8, 8)).save(stream, kind)
        answer(stream.getvalue(), 64, transform)


def _bound_memory(spare_bytes: int) -> None:
    """Where the system can (Linux): further memory fails, and with it the one picture."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes,) * 2)


def _bound_time(seconds: int) -> None:
    """Where the system can (not Windows): this process dies once it has computed so long, whoever still watches it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, most))
