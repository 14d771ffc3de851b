"""The log of a process as Chinese-CLIP's training script sets it up: through a queue, to the screen and to a file.

`cn-clip train` sets up its own, in `logs`.
"""

import atexit
import logging
import multiprocessing
from logging.handlers import QueueHandler, QueueListener
from multiprocessing.queues import Queue
from typing import Any

from cn_clip.training.logs import TIME_FORMAT


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
    """Sends the root logger's records of this level and above into the queue, in place of its first handler."""
    handler = QueueHandler(log_queue)
    handler.addFilter(WorkerLogFilter(rank))
    handler.setLevel(level)
    root = logging.getLogger()
    if root.handlers:
        root.removeHandler(root.handlers[0])
    root.addHandler(handler)
    root.setLevel(level)
