"""What the web page lets in: of Gradio's routes those that it uses, and uploads, bounded before another is written.

`Uploads.read` is the one way from a path that a request names to the bytes of a file.
"""

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path, PurePath

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip.files import HeldFolder
from cn_clip.serve.schemas import RefusalError

log = logging.getLogger(__name__)

# Seconds between sweeps, and the age of what they delete.
SWEEP_SECONDS = 60.0
MAX_AGE = 900.0
# Seconds after which the oldest uploads may have been deleted.
RETRY_AFTER = 60
_PREFIX = "cn-clip-page-"
_BLOCK = 512
# What the smallest file or folder is charged with, that there be not too many of them.
_LEAST_BYTES = 4096
# An upload is a file of less than the body that brought it, in whole blocks, and a folder.
_OVERHEAD = 3 * _LEAST_BYTES
# A link is not followed, and a pipe without a writer does not block. Windows has neither flag.
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def held_folder() -> HeldFolder:
    """A new folder below that of temporary files; those of servers of this user that were killed are deleted."""
    return HeldFolder(Path(tempfile.gettempdir()).resolve(), _PREFIX)


class Uploads:
    """The folder of uploads, for one event loop.

    Each upload is charged with what the largest may take, and the folder measured once the charges reach the bound:
    small uploads cost a look at the folder now and then, and nothing else. largest: bytes of a body.
    """

    def __init__(self, folder: Path, *, most_bytes: int, largest: int) -> None:
        self.folder, self.most_bytes, self.largest = folder.resolve(), most_bytes, largest
        self._charge = largest + _OVERHEAD
        self._charged = self._num_writing = 0
        self._admission, self._idle = asyncio.Lock(), asyncio.Event()
        self._idle.set()

    def read(self, path: object) -> bytes:
        """The bytes of an upload, which `path` names as a request wrote it.

        Raises RefusalError (400) for anything but a regular file of the folder, under one name, of at most `largest`
        bytes; the same for all, so that the answer says nothing of other files.
        """
        try:
            descriptor = _open_below(self.folder, self.names(path))
        except (OSError, ValueError) as error:  # ValueError: a name with NUL, or one that the disk cannot spell
            raise _no_upload() from error
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_size > self.largest:
                raise _no_upload()
            with open(descriptor, "rb", closefd=False) as stream:
                data = stream.read(self.largest + 1)
        finally:
            os.close(descriptor)
        if len(data) > self.largest:  # it grew meanwhile
            raise _no_upload()
        return data

    def names(self, path: object) -> tuple[str, ...]:
        """The folders and the file that `path` names below the folder; raises RefusalError (400) for any other path.

        Looks at no disk: a link is found when the file is opened.
        """
        given = PurePath(path) if isinstance(path, str) else PurePath()
        names = given.parts[len(self.folder.parts) :]
        if given.parts[: len(self.folder.parts)] != self.folder.parts or not names or ".." in names:
            raise _no_upload()
        return names

    @contextlib.asynccontextmanager
    async def one_more(self) -> AsyncIterator[None]:
        """Inside, an upload may be written; raises RefusalError (503) when there is no room for the largest."""
        async with self._admission:
            if self._charged + self._charge > self.most_bytes:
                await self._measure()
            if self._charged + self._charge > self.most_bytes:
                message = f"the uploads of the page take up their {self.most_bytes >> 20} MiB; ask again later"
                raise RefusalError(503, message, code="uploads_full", retry_after=RETRY_AFTER)
            self._charged += self._charge
            self._num_writing += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._num_writing -= 1
            if not self._num_writing:
                self._idle.set()

    async def sweep(self) -> None:
        """Deletes what is older than `MAX_AGE`, while no upload is being written."""
        async with self._admission:
            await self._idle.wait()
            await self._measure()

    async def keep_sweeping(self) -> None:
        """Sweeps now and then, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except OSError:
                log.exception("%s: could not be swept", self.folder)

    async def _measure(self) -> None:
        """Charges what is there; first deletes what is old, unless a folder may be about to be written into."""
        if self._num_writing == 0:
            # When cancelled, it goes on only once the thread has returned.
            deleting = asyncio.ensure_future(asyncio.to_thread(delete_older, self.folder, time.time() - MAX_AGE))
            try:
                await asyncio.shield(deleting)
            finally:
                await asyncio.wait((deleting,))
        unfinished = self._num_writing * self._charge
        self._charged = unfinished + await asyncio.to_thread(bytes_on_disk, self.folder)


def _open_below(folder: Path, names: Sequence[str]) -> int:
    """A descriptor of a file below `folder`, no name of which is a link; raises OSError."""
    if os.open not in os.supports_dir_fd:  # Windows
        path = folder.joinpath(*names)
        if path.resolve(strict=True) != path:
            raise FileNotFoundError(path)
        return os.open(path, _OPEN_FLAGS)
    at = os.open(folder, _OPEN_FLAGS)
    for name in names:
        try:
            inner = os.open(name, _OPEN_FLAGS, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    return at


def _no_upload() -> RefusalError:
    return RefusalError(400, "a picture is read from an upload of the page only, no path or address", code="no_upload")


def delete_older(folder: Path, before: float) -> None:
    """Deletes the files in `folder` that were last changed before that time, and the folders that are then empty."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_mtime < before:
                    os.unlink(path)
        if Path(parent) != folder:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(parent)


def bytes_on_disk(folder: Path) -> int:
    """What the files and folders in `folder` take, in whole blocks: many tiny files take much."""
    total = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += max(os.lstat(os.path.join(parent, name)).st_blocks * _BLOCK, _LEAST_BYTES)
    return total


# --- the door of the page

REFUSED = "做不到"
MOST_LOGGED_CHARS = 200
# What the page asks Gradio for; it would answer far more.
_READ = (
    *("config", "theme.css", "assets/", "static/"),
    *("gradio_api/upload_progress", "gradio_api/queue/data", "gradio_api/heartbeat/"),
)
_UPLOAD = "gradio_api/upload"
# The boundary stands before a part and behind the last.
_MARKS_OF_ONE_PART = 2
_WRITTEN = (_UPLOAD, "gradio_api/queue/join", "gradio_api/cancel", "gradio_api/reset")


class Door:
    """ASGI middleware: of Gradio's routes, those that the page uses; 404 for the rest.

    An upload needs room, and holds one file: Gradio would take a thousand, each in a folder of its own.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self.app, self.uploads = app, uploads
        self._read = (*_READ, f"gradio_api/file={uploads.folder}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        is_begun = False

        async def noting(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            path = str(scope["path"]).removeprefix(scope["root_path"]).lstrip("/")
            method = scope.get("method")
            is_read = method in ("GET", "HEAD") and (not path or path.startswith(self._read))
            if not is_read and not (method == "POST" and path in _WRITTEN):
                raise RefusalError(404, "Not Found")
            if path == _UPLOAD:
                body = await _with_one_file(scope, receive)
                async with self.uploads.one_more():
                    await self.app(scope, body, noting)
            else:
                await self.app(scope, receive, noting)
        except RefusalError as refusal:
            await refusal.response()(scope, receive, send)
        except Exception as error:
            # What Gradio raises for requests that its scripts do not send; the server would log 100 lines of each.
            log.warning("a request to the page was refused: %s", one_line(error))
            if not is_begun:
                await RefusalError(400, f"{REFUSED} / no request of the page's own").response()(scope, receive, send)


async def _with_one_file(scope: Scope, receive: Receive) -> Receive:
    """What gives the body once more; raises RefusalError (400) where it is of several parts."""
    _, options = parse_options_header(Headers(scope=scope).get("content-type", ""))
    mark, messages = b"--" + options.get(b"boundary", b""), list[Message]()
    more = True
    while more:
        message = await receive()
        messages.append(message)
        more = message.get("more_body", False)
    if b"".join(message.get("body", b"") for message in messages).count(mark) > _MARKS_OF_ONE_PART:
        raise RefusalError(400, "an upload holds one file; send the others by themselves")

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again


def one_line(error: Exception) -> str:
    """What a log says of an error that a request caused."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_LOGGED_CHARS]}"
