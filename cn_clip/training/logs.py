"""What a run writes for people: the log on the screen and in the file, in the lines of Chinese-CLIP."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("cn_clip")

LINE_FORMAT = "%(asctime)s | %(levelname)s | Rank {rank} | %(message)s"
TIME_FORMAT = "%Y-%m-%d,%H:%M:%S"


@contextmanager
def logging_to(path: Path, *, rank: int, debug: bool) -> Iterator[None]:
    """Sends this package's log to the screen and to `path` while the block runs.

    Processes other than the first have nothing else to say than it, but for warnings, which go to the screen.
    """
    formatter = logging.Formatter(LINE_FORMAT.format(rank=rank), datefmt=TIME_FORMAT)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if rank == 0:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
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
            handler.close()
        logger.level, logger.propagate = level, propagate


def log_params(values: dict[str, Any], path: Path) -> None:
    """Writes the settings to `params_*.txt` and to the log, sorted by name."""
    path.write_text("".join(f"{name}: {values[name]}\n" for name in sorted(values)), encoding="utf-8")
    logger.info("Params:")
    for name in sorted(values):
        logger.info("  %s: %s", name, values[name])
