"""The log of a run: on the screen and in a file, in the lines of Chinese-CLIP.

`setup_primary_logging` and `setup_worker_logging` are Chinese-CLIP's names, for programs with their own loop: the log
of several processes through a queue.
"""

import atexit
import contextlib
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from cn_clip import terminal
from cn_clip.files import atomic_write
from cn_clip.language import both, translated
from cn_clip.secret import hidden_in

logger = logging.getLogger("cn_clip")

LINE_FORMAT = "%(asctime)s | %(levelname)s | Rank {rank} | %(message)s"
TIME_FORMAT = "%Y-%m-%d,%H:%M:%S"


@contextlib.contextmanager
def logging_to(path: Path, *, rank: int, debug: bool) -> Iterator[None]:
    """Sends this package's log to the screen and to `path` while the block runs.

    Processes other than the first have nothing else to say than it, but for warnings, which go to the screen.
    """
    formatter = logging.Formatter(LINE_FORMAT.format(rank=rank), datefmt=TIME_FORMAT)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if rank == 0:
        handlers.append(_LogFile(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # said when the line could not be written
                handler.close()
        logger.level, logger.propagate = level, propagate


class _LogFile(logging.FileHandler):
    """A log without which the run goes on once it cannot be written: the disk may be full until the next checkpoint."""

    is_lost = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_lost:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is that of logging
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.is_lost = True
        reason = f"{self.baseFilename}: cannot be written ({error.strerror})"
        line = both(
            f"警告：{translated(reason)}；训练继续，但没有这份日志",
            f"warning: {reason}; the run goes on without this log",
        )
        terminal.say(line, to=sys.stderr)


def log_params(values: dict[str, Any], path: Path) -> None:
    """Writes the settings to `params_*.txt` and to the log, sorted by name."""
    with atomic_write(path) as stream:
        stream.writelines(hidden_in(f"{name}: {values[name]}\n") for name in sorted(values))
    logger.info("Params:")
    for name in sorted(values):
        logger.info("  %s: %s", name, hidden_in(str(values[name])))


# --- Chinese-CLIP's names ---------------------------------------------------------------------------------------------


def setup_primary_logging(log_file: str, level: int, rank: int) -> "Queue[Any]":
    """Starts a thread that writes what comes through the returned queue to stderr, on rank 0 also to `log_file`.

    The queue may be handed to other processes. What is in it when this process ends is still written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if rank == 0:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt=TIME_FORMAT))
        handler.setLevel(level)
    log_queue: Queue[Any] = multiprocessing.Queue(-1)
    listener = QueueListener(log_queue, *handlers)
    listener.start()
    atexit.register(listener.stop)
    return log_queue


class WorkerLogFilter(logging.Filter):
    """Lets every record pass, with `Rank N | ` in front of its message; -1: unchanged."""

    def __init__(self, rank: int = -1) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Puts the rank before the message; keeps every record."""
        if self._rank != -1:
            record.msg = f"Rank {self._rank} | {record.msg}"
        return True


def setup_worker_logging(rank: int, log_queue: "Queue[Any]", level: int) -> None:
    """Sends the root logger's records of this level and above into the queue, instead of its first handler."""
    handler = QueueHandler(log_queue)
    handler.addFilter(WorkerLogFilter(rank))
    handler.setLevel(level)
    root = logging.getLogger()
    if root.handlers:
        root.removeHandler(root.handlers[0])
    root.addHandler(handler)
    root.setLevel(level)
