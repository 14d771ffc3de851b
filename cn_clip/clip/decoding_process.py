"""A process that decodes pictures: each has so long and so much memory; then the process is killed and made anew.

The service decodes all pictures so (`serve.decoders`), and `pictures.opened` those whose cost their head does not
bound.
"""

import atexit
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from cn_clip.clip.decoding import (
    ANSWER,
    JOB,
    MAX_FACTS_BYTES,
    MAX_SENTENCE_BYTES,
    PICTURE,
    READY,
    SECONDS_PER_PIXEL,
    SETTINGS,
    TOO_LARGE,
    unpacked,
)
from cn_clip.clip.inputs import PictureTransform
from cn_clip.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# Decoding a picture may take so many seconds of a processor, and `decoding.SECONDS_PER_PIXEL` for its pixels.
DECODE_SECONDS = 3.0
# And so much memory beyond what an idle process has: pixels of four bytes, copied in a few modes and sizes.
DECODE_BYTES, DECODE_BYTES_PER_PIXEL = 256 << 20, 24
# PIL itself refuses larger pictures.
MOST_PIXELS = 2 * 89_478_485
# Seconds, by the clock, for one that does not compute, and for Windows, where no processor time is bounded.
WAITING_SECONDS = 120.0
# The path of the modules comes by the arguments: the folder that this process was started in is not on it.
_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from cn_clip.clip.decoding import main; main()"
# Not for one that a picture might take over.
_SECRETS = ("CN_CLIP_API_KEY",)


class ProcessEndedError(DataError):
    """The process ended over a picture; the message says why."""


class ProcessStartError(OSError):
    """No process can be started."""


class ProcessClosedError(Exception):
    """The process was closed, and is not started again."""


class DecodingProcess:
    """One process, started when it is needed; used by one thread at a time, and killed from any.

    transform: what is done to the pictures there; None: they come back as they are. num_bytes: the most that an answer
    holds. spare_bytes: memory that decoding may take. niceness: by how much its claim to the processors is less.
    """

    def __init__(
        self, transform: PictureTransform | None, *, num_bytes: int, spare_bytes: int, niceness: int = 0
    ) -> None:
        data = pickle.dumps(transform)
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

    def ask(self, data: bytes, seconds: float, max_pixels: int) -> tuple[int, bytes]:
        """What `decoding.answer` gives for an encoded picture.

        Raises ProcessEndedError when the picture takes too long or ends the process, and what `start` raises.
        """
        self.start()
        try:
            self._send(JOB.pack(seconds, max_pixels, len(data)), data)
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


def opened_elsewhere(data: bytes) -> "Image":
    """The picture, decoded by a process that is killed when it takes too long; there are as many as threads that ask.

    Raises ProcessEndedError for a picture that takes more time or memory than one has, and OSError for one that cannot
    be decoded, or where no process can be started.
    """
    try:
        process = _idle.pop()
    except IndexError:
        process = _new_process()
    deadline = threading.Timer(WAITING_SECONDS, process.kill)
    deadline.daemon = True
    deadline.start()
    try:
        kind, answer = process.ask(data, DECODE_SECONDS, MOST_PIXELS)
    finally:
        deadline.cancel()
        _idle.append(process)
    if kind == PICTURE:
        return unpacked(answer)
    sentence = answer.decode(errors="replace")
    if kind == TOO_LARGE:
        sentence = f"at most {MOST_PIXELS} pixels a picture are read, this one has {sentence}"
    raise OSError(sentence)


def _new_process() -> DecodingProcess:
    _end_with_this_process()
    spare_bytes = DECODE_BYTES + DECODE_BYTES_PER_PIXEL * MOST_PIXELS
    return DecodingProcess(None, num_bytes=4 * MOST_PIXELS + MAX_FACTS_BYTES, spare_bytes=spare_bytes)


@functools.cache
def _end_with_this_process() -> None:
    atexit.register(_end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_to_parent)


def _end() -> None:
    while _idle:
        process = _idle.pop()
        process.close()
        process.reap()


def _leave_to_parent() -> None:
    _of_the_parent.extend(_idle)
    _idle.clear()
