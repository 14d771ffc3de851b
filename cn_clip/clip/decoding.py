"""A process that decodes pictures: each has so long and so much memory; then the process is killed and made anew.

The service decodes all pictures so (`serve.pictures`), and `pictures.opened` those whose cost their head does not
bound. The process runs `main`: encoded pictures come by its standard input, pixels leave by its standard output. It
imports only what a picture needs, so it starts quickly; and it knows no secret of the program that started it.
"""

import atexit
import contextlib
import io
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, cast

from PIL import Image, UnidentifiedImageError

from cn_clip.clip.orientation import FULL_SIZE, full_size
from cn_clip.clip.orientation import upright as turned_upright
from cn_clip.clip.photo_files import described
from cn_clip.clip.picture_files import TooManyPixelsError, check_directory, look, opened_here, prepare
from cn_clip.clip.picture_names import MOST_PIXELS
from cn_clip.errors import DataError

try:
    import resource
except ImportError:  # Windows
    resource: Any = None  # type: ignore[no-redef]

if TYPE_CHECKING:
    from cn_clip.clip.thumbnails import SmallJpeg
    from cn_clip.clip.transforms import ImageTransform, PictureTransform

# Of the pixels that are answered, or a JPEG instead.
AnswerType: TypeAlias = Literal["float32", "uint8", "jpeg"]
# Decoding a picture may take so many seconds of a processor, and `SECONDS_PER_PIXEL` for its pixels.
DECODE_SECONDS = 3.0
# And so much memory beyond what an idle process has: pixels of four bytes, copied in a few modes and sizes.
DECODE_BYTES, DECODE_BYTES_PER_PIXEL = 256 << 20, 24
# Seconds, by the clock, for one that does not compute, and for Windows, where no processor time is bounded.
WAITING_SECONDS = 120.0
# The path of the modules comes by the arguments: the folder that this process was started in is not on it.
_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from cn_clip.clip.decoding import main; main()"
# Not for one that a picture might take over.
_SECRETS = ("CN_CLIP_API_KEY",)
# What a process is told first: the bytes of a pickle, those that decoding may take beyond what the process has, and by
# how much its claim to the processors is less than that of others.
SETTINGS = struct.Struct("<QQB")
# A picture: processor seconds besides those for its pixels, most pixels, the side that must remain where there is no
# transform (0: all), bytes of the file, which follow.
JOB = struct.Struct("<dQQQ")
# What comes back: one of the kinds, and the bytes of what follows: of PIXELS (3, R, R), of PICTURE what
# `unpacked` reads, of JPEG a file, of REFUSED a sentence and of TOO_LARGE the size, in UTF-8.
ANSWER = struct.Struct("<BQ")
READY, PIXELS, PICTURE, JPEG, REFUSED, TOO_LARGE = range(6)
MAX_SENTENCE_BYTES = 1000
# Of what describes a picture: larger EXIF is left out.
MAX_FACTS_BYTES, MAX_EXIF_BYTES = 1 << 20, 1 << 18
# Seconds of a processor for a million pixels: five times what a PNG takes.
SECONDS_PER_PIXEL = 0.25e-6
_FACTS = struct.Struct("<I")


# --- what the process runs


def main() -> None:
    """Decodes until its input ends."""
    for name in ("SIGINT", "SIGTERM"):  # these reach a whole group of processes; this one is ended by who started it
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    num_bytes, spare_bytes, niceness = SETTINGS.unpack(requests.read(SETTINGS.size))
    transform: PictureTransform | SmallJpeg | None
    transform, pixel_type, upright = pickle.loads(requests.read(num_bytes))
    for kind in ("JPEG", "PNG"):  # has all imported that a picture needs
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, kind)
        answer(stream.getvalue(), math.inf, 64, transform, pixel_type, upright=upright)
    # Where the system can (Linux), further memory fails, and with it the one picture.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes,) * 2)
    if hasattr(os, "nice"):
        os.nice(niceness)
    _write(answers, READY, b"")
    # Libraries print what they think of a picture.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while len(head := requests.read(JOB.size)) == JOB.size:
        seconds, max_pixels, side, num_bytes = JOB.unpack(head)
        data = requests.read(num_bytes)
        given: Any = {"upright": upright, "draft_size": side or None}
        _write(answers, *answer(data, seconds, max_pixels, transform, pixel_type, **given))


def answer(
    data: bytes,
    seconds: float,
    max_pixels: int,
    transform: "PictureTransform | SmallJpeg | None",
    pixel_type: "AnswerType" = "float32",
    *,
    upright: bool = False,
    draft_size: int | None = None,
) -> tuple[int, bytes]:
    """(a kind, what `transform` makes of the first frame, without one the picture, or why there is none).

    seconds: of a processor, besides those for the pixels that the file declares; then this process dies.
    """
    try:
        used = resource.getrusage(resource.RUSAGE_SELF) if resource else None
        started = used.ru_utime + used.ru_stime if used else 0.0
        _bound_time(started + seconds)
        with opened_here(data, look(data)) as image:
            num_pixels = image.width * image.height
            prepare(image, draft_size if transform is None else transform.draft_size, most=max_pixels)
            _bound_time(started + seconds_for(num_pixels, seconds))
            image.load()
            if transform is None:
                return PICTURE, packed(image)
            if pixel_type == "jpeg":
                return JPEG, cast("SmallJpeg", transform).jpeg(image)
            seen = turned_upright(image) if upright else image
            if pixel_type == "uint8":
                return PIXELS, cast("ImageTransform", transform).bytes(seen).tobytes()
            return PIXELS, cast("PictureTransform", transform).array(seen).astype("<f4", copy=False).tobytes()
    except TooManyPixelsError as error:
        return TOO_LARGE, error.size.encode()
    except MemoryError:
        return REFUSED, b"it takes too much memory"
    except UnidentifiedImageError:  # its message names an object of Python
        return REFUSED, b"no known picture format"
    except Exception as error:  # what PIL's plugins raise has no common type
        return REFUSED, " ".join(str(error).split()).encode(errors="replace")[:MAX_SENTENCE_BYTES]


def seconds_for(num_pixels: int, seconds: float) -> int:
    """Processor seconds that a picture may take, `seconds` of them whatever its size."""
    return math.ceil(seconds + num_pixels * SECONDS_PER_PIXEL)


def packed(image: Image.Image) -> bytes:
    """A loaded picture as `unpacked` reads it: pixels, palette, transparency and EXIF."""
    palette, transparency, exif = image.palette, image.info.get("transparency"), image.info.get("exif")
    if not isinstance(exif, bytes):  # of a TIFF it is the file itself
        with contextlib.suppress(Exception):  # Pillow raises errors of many types
            exif = described(image.getexif()).tobytes()
    if isinstance(exif, bytes):
        try:
            check_directory(exif)
        except (DataError, struct.error, IndexError):  # Pillow would read the same bytes again and again
            exif = None
    facts = {
        "mode": image.mode,
        "size": image.size,
        "full_size": full_size(image),
        "format": image.format,
        "palette": None if palette is None else [palette.mode, image.getpalette(None)],
        "transparency": list(transparency) if isinstance(transparency, (bytes, tuple)) else transparency,
        "exif": exif.hex() if isinstance(exif, bytes) and len(exif) <= MAX_EXIF_BYTES else None,
    }
    head = json.dumps(facts).encode()
    return _FACTS.pack(len(head)) + head + image.tobytes()


def unpacked(data: bytes) -> Image.Image:
    """The picture that was packed; raises ValueError and others for what was not."""
    (num_bytes,) = _FACTS.unpack_from(data)
    facts = json.loads(data[_FACTS.size : _FACTS.size + num_bytes])
    image = Image.frombytes(facts["mode"], tuple(facts["size"]), memoryview(data)[_FACTS.size + num_bytes :])
    image.format = facts["format"]
    if facts["full_size"] != facts["size"]:
        image.info[FULL_SIZE] = tuple(facts["full_size"])
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


def _write(answers: BinaryIO, kind: int, data: bytes) -> None:
    answers.write(ANSWER.pack(kind, len(data)))
    answers.write(data)
    answers.flush()


def _bound_time(seconds: float) -> None:
    """Where the system can (not Windows): this process dies once it has computed so long, even if nobody waits."""
    with contextlib.suppress(AttributeError, OSError, ValueError, OverflowError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), most))


# --- the process, as its owner sees it


class ProcessEndedError(DataError):
    """The process ended over a picture; the message says why."""


class ProcessStartError(OSError):
    """No process can be started."""


class ProcessClosedError(Exception):
    """The process was closed, and is not started again."""


class DecodingProcess:
    """One process, started when it is needed; used by one thread at a time, and killed from any.

    transform: what is done to the pictures there; None: they come back as they are. pixel_type: of their pixels, or
    "jpeg", which goes with SmallJpeg.
    upright: turns them by their EXIF orientation before. num_bytes: the most that an answer holds. spare_bytes: memory
    that decoding may take. niceness: by how much its claim to the processors is less.
    """

    def __init__(
        self,
        transform: "PictureTransform | SmallJpeg | None",
        *,
        num_bytes: int,
        spare_bytes: int,
        niceness: int = 0,
        pixel_type: "AnswerType" = "float32",
        upright: bool = False,
    ) -> None:
        data = pickle.dumps((transform, pixel_type, upright))
        self._settings = SETTINGS.pack(len(data), spare_bytes, niceness) + data
        self._num_bytes = max(num_bytes, MAX_SENTENCE_BYTES)
        self.child: subprocess.Popen[bytes] | None = None
        self._is_killed = self.is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self.child is not None and self.child.poll() is None

    def start(self) -> None:
        """Has the process running and ready; raises ProcessStartError when it cannot be, ProcessClosedError."""
        if self.is_running:
            return
        self.kill()
        self.reap()
        try:
            if not sys.executable:
                raise FileNotFoundError("no Python is known that could be started")
            environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
            environment["OMP_NUM_THREADS"] = "1"
            self.child = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._is_killed = False
            if self.is_closed:
                self.kill()
            self._send(self._settings)
            if self._received()[0] != READY:
                raise ConnectionError("it is not ready")
        except OSError as error:
            status = self.reap()
            if self.is_closed:
                raise ProcessClosedError from error
            raise ProcessStartError(f"no process can be started that decodes pictures: {error} ({status=})") from error
        except BaseException:  # Ctrl-C: its first answer is still to come
            self.reap()
            raise

    def ask(self, data: bytes, seconds: float, max_pixels: int, draft_size: int | None = None) -> tuple[int, bytes]:
        """What `answer` gives for an encoded picture.

        Raises ProcessEndedError when the picture takes too long or ends the process, and what `start` raises.
        """
        self.start()
        try:
            self._send(JOB.pack(seconds, max_pixels, draft_size or 0, len(data)), data)
            return self._received()
        except OSError as error:
            was_killed = self._is_killed
            status = self.reap()
            if self.is_closed:
                raise ProcessClosedError from error
            if was_killed or (status is not None and -status == getattr(signal, "SIGXCPU", 0)):
                raise ProcessEndedError(
                    f"it takes more than the {seconds:g} seconds, and {SECONDS_PER_PIXEL * 1e6:g} for a million "
                    "pixels, that a picture has"
                ) from error
            raise ProcessEndedError(f"its decoder ended with status {status}") from error
        except BaseException:  # Ctrl-C: what it still answers belongs to no other picture
            self.reap()
            raise

    def kill(self) -> None:
        """Ends the process, and what waits for it; may be called by any thread."""
        self._is_killed = True
        if (process := self.child) is not None:
            process.kill()

    def close(self) -> None:
        """Kills the process; no further one is started."""
        self.is_closed = True
        self.kill()

    def reap(self) -> int | None:
        """Kills what may still run of the process; its exit status, None where there was none."""
        process, self.child = self.child, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):  # what was to be flushed
            process.__exit__(None, None, None)
        return process.returncode

    def _send(self, *pieces: bytes) -> None:
        assert self.child is not None
        assert self.child.stdin is not None
        for piece in pieces:
            self.child.stdin.write(piece)
        self.child.stdin.flush()

    def _received(self) -> tuple[int, bytes]:
        """(kind, what follows); raises OSError when the process ends, or answers with more than it may."""
        assert self.child is not None
        assert self.child.stdout is not None
        head = self.child.stdout.read(ANSWER.size)
        if len(head) < ANSWER.size:
            raise ConnectionError("it ended")
        kind, num_bytes = ANSWER.unpack(head)
        if num_bytes > self._num_bytes:
            raise ConnectionError("it answers what it should not")
        data = self.child.stdout.read(num_bytes)
        if len(data) < num_bytes:
            raise ConnectionError("it ended")
        return kind, data


# --- pictures of the commands

# Processes that no thread uses now.
_idle: list[DecodingProcess] = []
# Those of the process that this one was forked from.
_of_the_parent: list[DecodingProcess] = []


def opened_elsewhere(data: bytes, draft_size: int | None = None) -> Image.Image:
    """The picture, decoded by a process that is killed when it takes too long; there are as many as threads that ask.

    Raises ProcessEndedError for a picture that takes more time or memory than one has, and OSError for one that cannot
    be decoded, or where no process can be started.
    """
    try:
        process = _idle.pop()
    except IndexError:
        spare_bytes = DECODE_BYTES + DECODE_BYTES_PER_PIXEL * MOST_PIXELS
        process = DecodingProcess(None, num_bytes=4 * MOST_PIXELS + MAX_FACTS_BYTES, spare_bytes=spare_bytes)
    deadline = threading.Timer(WAITING_SECONDS, process.kill)
    deadline.daemon = True
    deadline.start()
    try:
        kind, answer = process.ask(data, DECODE_SECONDS, MOST_PIXELS, draft_size)
    finally:
        deadline.cancel()
        _idle.append(process)
    if kind == PICTURE:
        return unpacked(answer)
    sentence = answer.decode(errors="replace")
    raise TooManyPixelsError(sentence, MOST_PIXELS) if kind == TOO_LARGE else OSError(sentence)


def _end() -> None:
    while _idle:
        process = _idle.pop()
        process.close()
        process.reap()


def _leave_to_parent() -> None:
    _of_the_parent.extend(_idle)
    _idle.clear()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
