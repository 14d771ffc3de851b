"""What the uploads of the web page take on the disk together: bounded before another one is written, and swept."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from cn_clip.serve.refusals import RefusalError

log = logging.getLogger(__name__)

# Seconds between sweeps, and the age of what they delete.
SWEEP_SECONDS = 60.0
MAX_AGE = 900.0
# Seconds after which the oldest uploads may have been deleted.
RETRY_AFTER = 60
_BLOCK = 512
# What the smallest file or folder is charged with, that there be not too many of them.
_LEAST_BYTES = 4096
# An upload is a file of less than the body that brought it, in whole blocks, and a folder.
_OVERHEAD = 3 * _LEAST_BYTES


class Uploads:
    """The folder of uploads, for one event loop.

    Each upload is charged with what the largest may take, and the folder measured once the charges reach the bound:
    small uploads cost a look at the folder now and then, and nothing else. largest: bytes of a body.
    """

    def __init__(self, folder: Path, *, most_bytes: int, largest: int) -> None:
        self.folder, self.most_bytes, self._charge = folder, most_bytes, largest + _OVERHEAD
        self._charged = self._num_writing = 0
        self._admission, self._idle = asyncio.Lock(), asyncio.Event()
        self._idle.set()

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
            await _to_the_end(delete_older, self.folder, time.time() - MAX_AGE)
        unfinished = self._num_writing * self._charge
        self._charged = unfinished + await asyncio.to_thread(bytes_on_disk, self.folder)


async def _to_the_end(function: Callable[..., object], *args: object) -> None:
    """Calls it in a thread; when cancelled, goes on only once it has returned."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        await asyncio.shield(call)
    finally:
        await asyncio.wait((call,))


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
