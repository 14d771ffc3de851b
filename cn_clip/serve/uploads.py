"""A bound on what the uploads of the web page take on the disk together, before another one is written."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from cn_clip.serve.refusals import RefusalError

# Seconds after which the oldest uploads may have been deleted.
RETRY_AFTER = 60
_BLOCK = 512


class Uploads:
    """The folder of uploads, for one event loop.

    Each upload is charged with what the largest may take, and the folder measured once the charges reach the bound:
    small uploads cost a look at the folder now and then, and nothing else.
    """

    def __init__(self, folder: Path, *, most_bytes: int, largest: int) -> None:
        self.folder, self.most_bytes, self.largest = folder, most_bytes, largest
        self._charged = self._num_writing = 0
        self._admission = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def one_more(self) -> AsyncIterator[None]:
        """Inside, an upload may be written; raises RefusalError (503) when there is no room for the largest."""
        async with self._admission:
            if self._charged + self.largest > self.most_bytes:
                unfinished = self._num_writing * self.largest
                self._charged = unfinished + await asyncio.to_thread(bytes_on_disk, self.folder)
            if self._charged + self.largest > self.most_bytes:
                message = f"the uploads of the page take up their {self.most_bytes >> 20} MiB; ask again later"
                raise RefusalError(503, message, code="uploads_full", retry_after=RETRY_AFTER)
            self._charged += self.largest
            self._num_writing += 1
        try:
            yield
        finally:
            self._num_writing -= 1


def bytes_on_disk(folder: Path) -> int:
    """What the files and folders in `folder` take, in whole blocks: many tiny files take much."""
    total = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += os.lstat(os.path.join(parent, name)).st_blocks * _BLOCK
    return total
