"""How long calls take, for the speed test of Chinese-CLIP, under its names too, and for `cn-clip bench`."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np


def call_seconds(call: Callable[[], object], *, repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` more; a call returns when its result is there."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: mean, sd (of all, not of a sample), min, max, median, 95p and 99p (interpolated)."""
    values = 1e3 * np.asarray(seconds)
    median, high, highest = np.percentile(values, [50, 95, 99])
    ends = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    return {key: float(value) for key, value in {**ends, "median": median, "95p": high, "99p": highest}.items()}


def summary_line(name: str, milliseconds: dict[str, float]) -> str:
    """The line of Chinese-CLIP's speed test: `[NAME] mean=…ms, sd=…ms, …`."""
    return f"[{name}] " + ", ".join(f"{key}={value:.2f}ms" for key, value in milliseconds.items())


def print_timings(name: str, timings: list[float]) -> None:
    """Prints mean, deviation, extremes and percentiles of `timings`, which are seconds, in milliseconds."""
    print(summary_line(name, summary(timings)))


@contextmanager
def track_infer_time(buffer: list[float]) -> Iterator[None]:
    """Appends the seconds that the block takes to `buffer`."""
    start = time.perf_counter()
    yield
    buffer.append(time.perf_counter() - start)
