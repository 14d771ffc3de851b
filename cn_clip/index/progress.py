"""How an index run tells of itself: a bar on a terminal, elsewhere a line whenever more is safe on disk."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from cn_clip import progress
from cn_clip.command import Speaker
from cn_clip.language import both


class Progress:
    """Of the pictures of one source. say: None for a run that tells nothing."""

    def __init__(self, say: Speaker | None = None) -> None:
        self._say = say
        self._bar: progress.Step | None = None
        self._total = self._num_looked_at = 0
        self._since = time.monotonic()

    @contextlib.contextmanager
    def looking(self) -> Iterator[Callable[[int], object]]:
        """Around the walk through a source that may take long, as of a disk in the network; called with more files."""
        with progress.progress(None, both("个文件", "files"), both("查看", "looking"), leaves=False) as bar:
            yield bar.advance

    @contextlib.contextmanager
    def over(self, total: int, *, done: int) -> Iterator[None]:
        """Around the work on `total` pictures, `done` of which need none."""
        self._total, self._num_looked_at, self._since = total, done, time.monotonic()
        with progress.progress(total, both("张", "pictures"), both("收录", "indexing"), done=done) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def advance(self, count: int) -> None:
        """`count` more pictures were computed, or found to need nothing, or to be none."""
        self._num_looked_at += count
        if self._bar is not None:
            self._bar.advance(count)

    def saved(self, done: int, num_new: int) -> None:
        """`done` pictures are safe on disk; num_new: those of them that this run has added."""
        if self._bar is not None:
            self._bar.tell(both(f"已保存 {done}", f"{done} saved"))
        if self._say is not None and not (progress.is_shown() and sys.stdout.isatty()):
            rate, left = num_new / max(time.monotonic() - self._since, 1e-9), self._total - self._num_looked_at
            more = ""
            if left > 0 and num_new:
                time_left = progress.clock(left / rate)
                more = both(f"，{rate:.1f} 张/s，还需 {time_left}", f", {rate:.1f}/s, {time_left} left")
            self._say.note(both(f"已完成 {done} / {self._total}{more}", f"{done} / {self._total} done{more}"))
