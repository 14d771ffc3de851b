"""How an index run tells of itself: a bar on a terminal, elsewhere a line whenever more is safe on disk."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from cn_clip.command import Speaker


class Progress:
    """Of the pictures of one source. say: None for a run that tells nothing."""

    def __init__(self, say: Speaker | None = None) -> None:
        self._say = say
        self._bar: tqdm[None] | None = None
        self._total = self._num_looked_at = 0
        self._since = time.monotonic()

    @property
    def _has_bar(self) -> bool:
        return self._say is not None and not self._say.quiet and sys.stdout.isatty() and sys.stderr.isatty()

    @contextlib.contextmanager
    def looking(self) -> Iterator[Callable[[int], object]]:
        """Around the walk through a source that may take long, as of a disk in the network; called with more files."""
        with tqdm(unit=" files", desc="查看 / looking", delay=1, leave=False, disable=not self._has_bar) as bar:
            yield bar.update

    @contextlib.contextmanager
    def over(self, total: int, *, done: int) -> Iterator[None]:
        """Around the work on `total` pictures, `done` of which need none."""
        self._total, self._num_looked_at, self._since = total, done, time.monotonic()
        is_shown = self._has_bar
        with tqdm(total=total, initial=done, unit="picture", dynamic_ncols=True, disable=not is_shown) as bar:
            self._bar = bar if is_shown else None
            try:
                yield
            finally:
                self._bar = None

    def advance(self, count: int) -> None:
        """`count` more pictures were computed, or found to need nothing, or to be none."""
        self._num_looked_at += count
        if self._bar is not None:
            self._bar.update(count)

    def saved(self, done: int, num_new: int) -> None:
        """`done` pictures are safe on disk; num_new: those of them that this run has added."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"saved {done}")
        elif self._say is not None:
            rate, left = num_new / max(time.monotonic() - self._since, 1e-9), self._total - self._num_looked_at
            more = f", {rate:.1f}/s, 还需 / left {tqdm.format_interval(left / rate)}" if left > 0 and num_new else ""
            self._say.note(f"已完成 / done {done} / {self._total}{more}")
