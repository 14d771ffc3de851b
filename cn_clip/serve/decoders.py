"""Processes that decode pictures of strangers: each has so long and so much memory for one, is killed and made anew."""

import asyncio
import contextlib
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cn_clip.clip.backends.base import Pixels
from cn_clip.clip.inputs import PictureTransform
from cn_clip.clip.picture_heads import Head
from cn_clip.serve.decoding import ANSWER, JOB, MAX_SENTENCE_BYTES, PIXELS, READY, SETTINGS, TOO_LARGE
from cn_clip.serve.limits import DECODE_BYTES, DECODE_BYTES_PER_PIXEL, DECODE_SECONDS, DECODE_SECONDS_PER_PIXEL, Limits
from cn_clip.serve.refusals import RefusalError

log = logging.getLogger(__name__)

# For a process to be ready; those of models that come with code of their own import a lot.
START_SECONDS = 60.0
# The path of the modules comes by the arguments: the folder that this process was started in is not on it.
_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from cn_clip.serve.decoding import main; main()"
# Not for one that a picture might take over.
_SECRETS = ("CN_CLIP_API_KEY",)


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture that was looked at; `param` names the field it came in, for errors."""

    data: bytes
    head: Head
    param: str

    @property
    def seconds(self) -> int:
        """Of a processor, that it may take."""
        return math.ceil(DECODE_SECONDS + self.head.width * self.head.height * DECODE_SECONDS_PER_PIXEL)


class Decoders:
    """At most `count` processes, for one event loop, each with a thread that waits for it."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.count, self._limits = count, limits
        self._threads = ThreadPoolExecutor(count, "decode")
        self._free, self._workers = asyncio.Semaphore(count), [_Worker() for _ in range(count)]
        self._idle = list(self._workers)
        self._busy_since: dict[_Worker, float] = {}

    async def open(self, transform: PictureTransform) -> None:
        """Says what is to become of the pictures, before the first; returns when the processes run, or cannot."""
        limits = self._limits
        spare = DECODE_BYTES + limits.max_body_bytes + DECODE_BYTES_PER_PIXEL * limits.max_pixels
        data = pickle.dumps(transform)
        settings = SETTINGS.pack(len(data), spare) + data
        for worker in self._workers:
            worker.prepare(settings, transform.resolution)
        await asyncio.gather(*[self._with_a_worker(_Worker.start) for _ in range(self.count)])

    async def pixels(self, picture: EncodedPicture) -> Pixels:
        """float32 (3, R, R) of the first frame; raises RefusalError naming its field.

        400: it does not decode, or not with the time and memory that a picture has. 503: no process can be started.
        """
        outcome = await self._with_a_worker(lambda worker: worker.decode(picture, self._limits.max_pixels))
        if isinstance(outcome, RefusalError):
            raise outcome
        assert outcome is not None
        return outcome

    def kill(self) -> None:
        """Kills the processes; may be called by any thread."""
        for worker in self._workers:
            worker.close()

    def close(self) -> None:
        """Kills the processes, and ends the threads."""
        self.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.reap()

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
        self, function: "Callable[[_Worker], Pixels | RefusalError | None]"
    ) -> Pixels | RefusalError | None:
        """What `function` gives in a thread."""
        await self._free.acquire()
        loop, worker = asyncio.get_running_loop(), self._idle.pop()
        self._busy_since[worker] = loop.time()
        # Its processor time is bounded by the system; this is for one that does not compute, and for Windows.
        seconds = self._limits.timeout + (0 if worker.is_running else START_SECONDS)
        deadline = loop.call_later(seconds, worker.kill)

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
    """One process, started when it is needed; used by one thread at a time, and killed from any."""

    def __init__(self) -> None:
        self._settings, self._num_bytes, self._resolution = b"", 0, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = self._is_closed = False
        self.has_failed = False

    def prepare(self, settings: bytes, resolution: int) -> None:
        self._settings, self._resolution = settings, resolution
        self._num_bytes = 3 * resolution * resolution * np.dtype(np.float32).itemsize

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> RefusalError | None:
        """Has the process running, and waits until it is ready; returns why it cannot be."""
        if self.is_running:
            return None
        self.kill()
        self.reap()
        try:
            environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
            environment["OMP_NUM_THREADS"] = "1"
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._is_killed = False
            if self._is_closed:
                self.kill()
            self._send(self._settings)
            kind, _ = self._received()
            self.has_failed = kind != READY
        except OSError as error:
            self.has_failed = not self._is_closed
            if self.has_failed:
                log.error("no process can be started that decodes pictures: %s (status %s)", error, self.reap())
        return _unavailable() if self.has_failed or self._is_closed else None

    def decode(self, picture: EncodedPicture, max_pixels: int) -> Pixels | RefusalError:
        """The pixels, or why there are none."""
        if (refusal := self.start()) is not None:
            return refusal
        try:
            self._send(JOB.pack(picture.seconds, max_pixels, len(picture.data)) + picture.data)
            kind, data = self._received()
        except OSError:
            return self._ended(picture)
        if kind == PIXELS and len(data) == self._num_bytes:
            pixels: Pixels = np.frombuffer(data, dtype="<f4").reshape(3, self._resolution, self._resolution)
            return pixels
        sentence = data.decode(errors="replace")
        if kind == TOO_LARGE:
            return too_large(sentence, picture.param, max_pixels)
        return undecodable(sentence, picture.param)

    def kill(self) -> None:
        """Ends the process, and what waits for it; may be called by any thread."""
        self._is_killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Kills the process; no further one is started."""
        self._is_closed = True
        self.kill()

    def _send(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _received(self) -> tuple[int, bytes]:
        """(kind, what follows); raises OSError when the process ends, or answers with more than it may."""
        assert self._process is not None
        assert self._process.stdout is not None
        head = self._process.stdout.read(ANSWER.size)
        if len(head) < ANSWER.size:
            raise ConnectionError("it ended")
        kind, num_bytes = ANSWER.unpack(head)
        if num_bytes > max(self._num_bytes, MAX_SENTENCE_BYTES):
            raise ConnectionError("it answers what it should not")
        data = self._process.stdout.read(num_bytes)
        if len(data) < num_bytes:
            raise ConnectionError("it ended")
        return kind, data

    def _ended(self, picture: EncodedPicture) -> RefusalError:
        was_killed = self._is_killed
        self.kill()
        status = self.reap()
        if self._is_closed:
            return RefusalError(503, "the server is stopping", code="stopping", retry_after=5)
        if was_killed or (status is not None and -status == getattr(signal, "SIGXCPU", 0)):
            log.warning("%s: a decoding process was killed: more than %d s", picture.head, picture.seconds)
            return undecodable(f"it takes more than the {picture.seconds} seconds that a picture has", picture.param)
        log.warning("%s: a decoding process ended with status %s", picture.head, status)
        return undecodable(f"its decoder ended with status {status}", picture.param)

    def reap(self) -> int | None:
        """Kills what may still run of the process; its exit status, None where there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):  # what was to be flushed
            process.__exit__(None, None, None)
        return process.returncode


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
