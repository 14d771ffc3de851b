"""How far long work has come, on one line of a terminal or in the output of a notebook cell; nothing in a pipe.

Everything that draws progress does it here: `progress` where work is counted, `working` where it is not.

    with progress(total, unit="pictures", label="encoding") as bar:
        for batch in batches:
            bar.advance(len(batch))

    with working("loading weights"):
        model = load(path)

A thread draws, a few times a second, the innermost step that has lasted for `DELAY` seconds: the line goes on while one
batch takes minutes, and counting costs an addition. What is printed meanwhile first takes the line away.
"""

import atexit
import contextlib
import importlib
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sized
from typing import Any, Final, Protocol, TextIO, TypeVar, cast

T = TypeVar("T")

DELAY: Final = 0.5  # seconds that a step lasts before it is shown
QUIET: Final = 1.5  # seconds without any output after which a step without a count is shown
TICK: Final = 0.2  # seconds between two looks at what has changed
WIDEST: Final = 100  # cells of a line on a wide terminal
NARROW: Final = 60  # cells below which the bar gives its room to the numbers

_WIDE = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{speed}{postfix}]"
_SHORT = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class Step:
    """Work that goes on: `label`, and how much of `total` units is done; without a total only what was done counts."""

    def __init__(
        self, label: str, *, unit: str = "", total: int | None = None, done: int = 0, in_bytes: bool = False
    ) -> None:
        self.label, self.unit, self.total, self.num_done = label, unit, total, done
        self.told = ""
        self._first, self._in_bytes = done, in_bytes
        self.since = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.num_done += count

    def tell(self, text: str) -> None:
        """Shows `text` behind the numbers, such as "loss 2.31"."""
        self.told = text

    @property
    def is_counted(self) -> bool:
        """Whether there is a number to show."""
        return self.total is not None or self.num_done != self._first

    def line(self, columns: int, *, in_ascii: bool = False) -> str:
        """The step as it is now, in at most `columns` cells."""
        elapsed = time.monotonic() - self.since
        told = f", {self.told}" if self.told else ""
        if not self.is_counted:
            return _cut(f"{self.label}{'...' if in_ascii else '…'} [{clock(elapsed)}{told}]", columns)
        speed = self._speed(elapsed)
        if not self.total:
            number = _sized(self.num_done) if self._in_bytes else f"{self.num_done} {self.unit}"
            return _cut(f"{self.label} {number} [{clock(elapsed)}{speed}{told}]", columns)
        from tqdm import tqdm

        text = tqdm.format_meter(
            self.num_done,
            self.total,
            elapsed,
            ncols=columns,
            prefix=self.label,
            ascii=in_ascii,
            unit_scale=self._in_bytes,
            unit_divisor=1024,
            initial=self._first,
            postfix=self.told,
            bar_format=_WIDE if columns >= NARROW else _SHORT,
            speed=speed,
        )
        return cast(str, text)

    def _speed(self, elapsed: float) -> str:
        a_second = (self.num_done - self._first) / max(elapsed, 1e-9)
        if not a_second:
            return ""
        if self._in_bytes:
            return f", {_sized(a_second)}/s"
        return f", {a_second:.1f} {self.unit}/s" if a_second >= 1 else f", {a_second * 60:.1f} {self.unit}/min"


@contextlib.contextmanager
def progress(
    total: int | None,
    unit: str,
    label: str,
    *,
    done: int = 0,
    in_bytes: bool = False,
    leaves: bool = True,
    when: bool = True,
) -> Iterator[Step]:
    """Around work on `total` units, `done` of which need none; call `advance` of what it gives.

    total: None where it is not known. leaves: whether the line stays after the work. when: False for a step that is not
    shown.
    """
    step = Step(label, unit=unit, total=total, done=done, in_bytes=in_bytes)
    with _line.showing(step, leaves=leaves, when=when):
        yield step


@contextlib.contextmanager
def working(label: str) -> Iterator[Step]:
    """Around work that cannot be counted, such as opening a file: shows how long it has taken."""
    step = Step(label)
    with _line.showing(step):
        yield step


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Around the wait of a command that serves others: that nothing happens is no work, but steps begun inside are."""
    with _line.showing(Step("")):
        yield


def counted(items: Iterable[T], unit: str, label: str, *, total: int | None = None) -> Generator[T]:
    """Each of `items`, counted; total: default their length, where they have one.

    A generator is closed with this one: what it holds, as threads, goes when its reader says so and not with the next
    collection of garbage, which may come in any thread.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    closed = contextlib.closing(items) if isinstance(items, Generator) else contextlib.nullcontext()
    with closed, progress(total, unit, label) as bar:
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def hidden(*, when: bool = True) -> Iterator[None]:
    """Nothing is drawn inside, as for a command with `--json`."""
    _line.num_hiding += when
    try:
        yield
    finally:
        _line.num_hiding -= when


def is_shown() -> bool:
    """Whether steps are drawn: standard error is a terminal, or this is a notebook, and nobody hides them."""
    return not _line.num_hiding and _surface() is not None


def put_away() -> None:
    """Takes the line off the terminal for good, as before a process ends at once."""
    with _line.lock:
        _line.clear()
        _line.num_hiding += 1


def cells_of(text: str) -> int:
    """Cells of a terminal that a text takes: 2 for wide and full-width characters, 0 for combining ones, else 1."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text if not unicodedata.combining(one))


def _cut(text: str, cells: int) -> str:
    while cells_of(text) > cells:
        text = text[:-1]
    return text


def clock(seconds: float) -> str:
    """Seconds as 02:40 or 1:02:40."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _sized(num_bytes: float) -> str:
    unit = "B"
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.3g} {unit}"


# --- where it is drawn ------------------------------------------------------------------------------------------------


class Surface(Protocol):
    """What one line can be drawn on."""

    def show(self, step: Step) -> None:
        """Draws the step in place of what is drawn."""
        ...

    def clear(self) -> None:
        """Takes away what is drawn."""
        ...

    def leave(self, step: Step) -> None:
        """Draws the step for the last time, to stay."""
        ...


class Terminal:
    """The last line of standard error: drawn over itself, without colours or any other escape code."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._shown, self._cells = "", 0
        self._in_ascii = not (stream.encoding or "").lower().replace("-", "").startswith(("utf", "gb", "cp936"))

    def show(self, step: Step) -> None:
        """Writes over the line."""
        text = step.line(self._columns(), in_ascii=self._in_ascii)
        if text == self._shown or not self._is_foreground():
            return
        cells = cells_of(text)
        self._write("\r" + text + " " * (self._cells - cells))
        self._shown, self._cells = text, cells

    def clear(self) -> None:
        """Writes blanks over the line."""
        if self._cells:
            self._write("\r" + " " * self._cells + "\r")
            self._shown, self._cells = "", 0

    def leave(self, step: Step) -> None:
        """Ends the line."""
        self.show(step)
        if self._cells:
            self._write("\n")
            self._shown, self._cells = "", 0

    def _columns(self) -> int:
        """Cells to write in: the last of a row stays free, or the cursor would go to the next."""
        columns = int(os.environ.get("COLUMNS", "") or 0) if os.environ.get("COLUMNS", "").isdecimal() else 0
        if not columns:
            with contextlib.suppress(OSError, ValueError):
                columns = os.get_terminal_size(self.stream.fileno()).columns
        return min((columns or 80) - 1, WIDEST)

    def _is_foreground(self) -> bool:
        """Whether the shell has not sent this process to the background, where it would write over what is typed."""
        try:
            return os.tcgetpgrp(self.stream.fileno()) == os.getpgrp()
        except (AttributeError, OSError, ValueError):  # Windows; a terminal that controls no processes
            return True

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class Lines:
    """A terminal that cannot draw over a line (TERM=dumb): further lines, ever more rarely."""

    FIRST, GROWTH = 2.5, 1.1

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._step: Step | None = None
        self._next = 0.0

    def show(self, step: Step) -> None:
        """Writes a line when the time for one has come."""
        elapsed = time.monotonic() - step.since
        if step is not self._step:
            self._step, self._next = step, max(self.FIRST, elapsed)
        if elapsed >= self._next:
            self._next = max(elapsed + self.FIRST, elapsed * self.GROWTH)
            self.stream.write(step.line(NARROW - 1, in_ascii=True) + "\n")
            self.stream.flush()

    def clear(self) -> None:
        """Lines stay."""

    def leave(self, step: Step) -> None:
        """Lines stay."""


class Cell:
    """The output of a notebook cell: one text that is replaced, so that a saved notebook holds only the last."""

    def __init__(self) -> None:
        self._display: Any = None
        self._shown = ""

    def show(self, step: Step) -> None:
        """Replaces the text."""
        self._put(step.line(80))

    def clear(self) -> None:
        """Empties the text."""
        if self._shown:
            self._put("")

    def leave(self, step: Step) -> None:
        """The text stays."""
        self.show(step)
        self._display, self._shown = None, ""

    def _put(self, text: str) -> None:
        from IPython.display import DisplayHandle

        if text == self._shown:
            return
        data = {"text/plain": text}
        if self._display is None:
            self._display = DisplayHandle()  # type: ignore[no-untyped-call]
            self._display.display(data, raw=True)
        else:
            self._display.update(data, raw=True)
        self._shown = text


def _surface() -> Surface | None:
    """Where steps of this process are drawn; None in a pipe, and in processes of torchrun other than the first."""
    stream = sys.stderr
    if isinstance(stream, _Aside):
        stream = stream.stream
    if os.environ.get("RANK", "0") != "0":
        return None
    try:
        if stream is not None and stream.isatty():
            return Lines(stream) if os.environ.get("TERM") == "dumb" else Terminal(stream)
    except ValueError:  # it is closed
        return None
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Cell() if getattr(shell, "kernel", None) is not None else None


class _Aside:
    """A standard stream on a terminal that takes the line away before it writes anything else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes to the stream."""
        with _line.lock:
            _line.clear()
            _line.written(text)
            return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them one by one."""
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Line:
    """The steps that go on, outermost first, and the line that shows one of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.num_hiding = 0
        self._steps: list[Step] = []
        self._surface: Surface | None = None
        self._drawn: Step | None = None
        self._written_at, self._is_at_start = 0.0, True
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def showing(self, step: Step, *, leaves: bool = False, when: bool = True) -> Iterator[None]:
        """The step is among those that go on; leaves: its last line stays if nothing is raised."""
        is_whole = False
        try:
            if when:
                self._begin(step)
            yield
            is_whole = True
        finally:
            self._end(step, stays=leaves and is_whole)

    def _begin(self, step: Step) -> None:
        with self.lock:
            if self.num_hiding:
                return
            if not self._steps:
                self._surface, self._written_at, self._is_at_start = _surface(), time.monotonic(), True
                if self._surface is None:
                    return
                self._stand_between(isinstance(self._surface, Terminal))
            if step.total:
                # Not first by the thread, where the locks of an import and of a fork could wait for each other.
                importlib.import_module("tqdm")
            self._steps.append(step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw_on, name="progress", daemon=True)
                self._thread.start()

    def _end(self, step: Step, *, stays: bool) -> None:
        with self.lock:
            if step not in self._steps:  # it is not shown, or is of the process that this one was forked from
                return
            self._steps.remove(step)
            is_outermost = not any(one.is_counted for one in self._steps)
            is_long = time.monotonic() - step.since >= DELAY  # else it came and went unseen, as most of its kind do
            with self._undrawable():
                if self._surface is None or self.num_hiding or not self._is_at_start:
                    pass
                elif stays and is_outermost and is_long:
                    self._surface.leave(step)
                    self._drawn, self._written_at = None, time.monotonic()
                elif self._drawn is step:
                    self._surface.clear()
                    self._drawn, self._written_at = None, time.monotonic()
            if not self._steps:
                self._surface = None
                self._stand_between(False)

    def _stand_between(self, is_needed: bool) -> None:
        """Puts `_Aside` before the standard streams that are terminals, or takes it away."""
        for name in ("stdout", "stderr"):
            stream: Any = getattr(sys, name)
            if is_needed and not isinstance(stream, _Aside) and stream is not None and stream.isatty():
                setattr(sys, name, _Aside(stream))
            elif not is_needed and isinstance(stream, _Aside):
                setattr(sys, name, stream.stream)

    def written(self, text: str) -> None:
        """Notes what else went to the terminal."""
        self._written_at = time.monotonic()
        if text:
            self._is_at_start = text.endswith(("\n", "\r"))

    def clear(self) -> None:
        """Takes the line away until it is drawn again; the caller holds the lock."""
        if self._surface is not None and self._drawn is not None:
            with self._undrawable():
                self._surface.clear()
            self._drawn = None

    def _draw_on(self) -> None:
        while True:
            time.sleep(TICK)
            with self.lock:
                if not self._steps:
                    self._thread = None
                    return
                with self._undrawable():
                    self._draw()

    def _draw(self) -> None:
        """Draws the innermost step that is due."""
        if self._surface is None or self.num_hiding or not self._is_at_start:
            return
        now = time.monotonic()
        for step in reversed(self._steps):
            if not step.label:  # see `resting`
                return
            lasted = now - step.since
            is_due = lasted >= DELAY and (step.is_counted or now - max(step.since, self._written_at) >= QUIET)
            if is_due or (step is self._drawn):
                self._surface.show(step)
                self._drawn = step
                return

    @contextlib.contextmanager
    def _undrawable(self) -> Iterator[None]:
        """A terminal that is gone ends the drawing, not the work."""
        try:
            yield
        except (OSError, ValueError):
            self.num_hiding += 1
            self._drawn = None

    # A child made by fork has no thread that draws, and its lines would come between those of its parent.

    def before_fork(self) -> None:
        self.lock.acquire()

    def after_fork(self) -> None:
        self.lock.release()

    def in_child(self) -> None:
        self.lock = threading.RLock()
        self._steps, self._surface, self._drawn, self._thread = [], None, None, None
        self.num_hiding += 1
        self._stand_between(False)


_line = _Line()
atexit.register(put_away)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_line.before_fork, after_in_parent=_line.after_fork, after_in_child=_line.in_child)
