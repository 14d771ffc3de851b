"""What `cn-clip index watch` does: waits for changes in a folder, and has the index brought up to them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip import extras
from cn_clip.command import Speaker
from cn_clip.digests import is_folder
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.index import building
from cn_clip.index.jobs import Model, job_of
from cn_clip.language import both, counted
from cn_clip.progress import resting
from cn_clip.stopping import StopRequest
from cn_clip.terminal import shown, told

if TYPE_CHECKING:
    from cn_clip.index.watch import Options

# Seconds: after which changes that do not end are taken all the same, after which a failed update is tried again, and
# between two looks for changes, signals and the folder itself.
LONGEST_WAIT = 60.0
RETRY = 15.0
LOOK = 0.5
# Between two looks with --poll, each of which reads the whole folder.
POLL_MS = 2000


class Quiet(Speaker):
    """Keeps the result of an update, and says nothing of it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.values: dict[str, Any] = {}

    def note(self, line: str) -> None:
        """Nothing: an update is told in one line."""

    def result(self, values: dict[str, Any]) -> None:
        """Keeps it."""
        self.values = values


def follow(options: "Options", say: Speaker) -> None:
    """Updates until SIGTERM or Ctrl-C; raises CnClipError for what the first update refuses, MissingExtraError."""
    extras.require("watchfiles", extra="watch", purpose="cn-clip index watch")
    if not is_folder(Path(options.source)):
        raise ConfigError("expected a folder to watch", at=options.source)
    follower = _Follower(options, say)
    with follower.stop.noted():
        building.update(options, follower.job, say, model=follower.model)
        source = shown(options.source)
        say.note(both(f"等待变化，按 Ctrl-C 结束：{source}", f"waiting for changes, press Ctrl-C to end: {source}"))
        with resting():
            for _ in follower.changes():
                follower.update()
    say.note(both(f"已停止：{shown(options.output)}", f"stopped: {shown(options.output)}"))


class _Follower:
    """One folder, and the index that follows it. failure: why the last update came to nothing."""

    def __init__(self, options: "Options", say: Speaker) -> None:
        self.options, self.job, self.say = options, job_of(options), say
        self.model = Model(options, self.job.address, say)
        self.stop, self.failure = StopRequest(), ""

    def update(self) -> None:
        """Brings the index up, and says so in one line."""
        quiet = Quiet()
        try:
            self.model.refresh()
            building.update(self.options, self.job, quiet, model=self.model)
        except CnClipError as error:
            if str(error) != self.failure:
                why = told(error)
                self._note(both(f"没有更新，稍后再试：{why}", f"not updated, trying again later: {why}"))
            self.failure = str(error)
            return
        counts = {
            both("新编码", "encoded"): quiet.values["encoded"],
            both("复用", "reused"): quiet.values["reused"],
            both("移除", "removed"): len(quiet.values["removed"]),
        }
        if any(counts.values()) or self.failure:
            number = quiet.values["num_items"]
            changed = both("，", ", ").join(f"{name} {count}" for name, count in counts.items() if count)
            changed = changed or both("没有变化", "no change")
            self._note(both(f"{changed}；共 {number} 项", f"{changed}; {counted(number, 'item')}"))
            self.say.result(quiet.values)
        self.failure = ""

    def changes(self) -> Iterator[None]:
        """Yields whenever the index is to be brought up, until it is to stop."""
        folder, was_there = Path(self.options.source).absolute(), True
        while self.stop.number is None:
            before = _identity(folder)
            if was_there != (before is not None):
                was_there = not was_there
                gone = both("不在了，等它回来", "is gone; waiting for it")
                state = both("又在了", "is there again") if was_there else gone
                self._note(f"{shown(folder)}: {state}")
            if before is None:
                time.sleep(LOOK)
            else:
                yield from self._due(folder, before)

    def _due(self, folder: Path, identity: tuple[int, int]) -> Iterator[None]:
        """As `changes`, as long as it is this folder."""
        last = tried = time.monotonic()
        first: float | None = last  # what came before it was watched is a change, too
        for has_changed in _watched(folder, self.options, self.stop):
            now = time.monotonic()
            if has_changed:
                first, last = first or now, now
            if _identity(folder) != identity:
                return
            is_quiet = now - last >= self.options.settle
            is_due = first is not None and (is_quiet or now - first >= LONGEST_WAIT)
            if is_due or (self.failure and now - tried >= RETRY):
                first = None if is_quiet else now  # whatever is read amid changes is read again after them
                yield
                tried = time.monotonic()

    def _note(self, line: str) -> None:
        self.say.note(f"{time.strftime('%H:%M:%S')} {line}")


def _watched(folder: Path, options: "Options", stop: StopRequest) -> Iterator[bool]:
    """Every moment whether anything has changed in the folder, hidden names and the index itself left aside."""
    watchfiles = extras.require("watchfiles", extra="watch", purpose="cn-clip index watch")
    index = os.path.join(os.path.realpath(options.output or ""), "")

    class Stopped:
        """As watchfiles wants to be told to stop."""

        def is_set(self) -> bool:
            return stop.number is not None

    def counts(_: object, path: str) -> bool:
        below = os.path.relpath(path, folder)
        is_hidden = any(part.startswith(".") and part not in (".", "..") for part in below.split(os.sep))
        return not is_hidden and not os.path.join(os.path.realpath(path), "").startswith(index)

    try:
        yield from map(
            bool,
            watchfiles.watch(
                folder,
                watch_filter=counts,
                step=100,
                debounce=int(1000 * LOOK),
                rust_timeout=int(1000 * LOOK),
                yield_on_timeout=True,
                stop_event=Stopped(),
                force_polling=options.poll or None,
                poll_delay_ms=POLL_MS,
                ignore_permission_denied=True,
            ),
        )
    except FileNotFoundError:  # it went as it was to be watched
        return
    except OSError as error:
        raise ConfigError(f"cannot be watched ({error}); give --poll", at=folder) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name; None for none."""
    try:
        facts = os.stat(folder)
    except OSError:
        return None
    return (facts.st_dev, facts.st_ino)
