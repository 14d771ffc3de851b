"""Timing under Chinese-CLIP's names; the numbers are those of `timing`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cn_clip.deploy.timing import summary, summary_line


def print_timings(name: str, timings: list[float]) -> None:
    """Prints mean, deviation, extremes and percentiles of `timings`, which are seconds, in milliseconds."""
    print(summary_line(name, summary(timings)))


@contextmanager
def track_infer_time(buffer: list[float]) -> Iterator[None]:
    """Appends the seconds that the block takes to `buffer`."""
    start = time.perf_counter()
    yield
    buffer.append(time.perf_counter() - start)
