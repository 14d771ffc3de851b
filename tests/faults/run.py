"""The standing harness: damaged files, kills, faults of the disk, hostile requests and a soak; `make test-faults`.

python tests/faults/run.py --seconds 60 --seed 0 --parts fuzz,kills

Every part ends with one line of counts; the status is 1 when any of tracebacks, signals, silent differences and losses
is not 0. The same seed damages the same files and kills at the same calls; the time decides how many of them.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

if TYPE_CHECKING:
    from faults.counts import Counts

# The share of the time of each part.
SHARES = {"fuzz": 0.35, "kills": 0.35, "disk": 0.1, "http": 0.1, "soak": 0.1}
# With less time in all, no soak unless it is asked for: it says nothing.
_SOAK_SECONDS = 300


@dataclass(frozen=True)
class Options:
    """Feeds damaged files to every reader, kills every command that writes, and attacks a running service."""

    seconds: float = 1500
    """Time of all parts together; what has begun is finished, and what it is too short for is left out"""
    seed: int = 0
    """Which damages and kills"""
    parts: str = ",".join(SHARES)
    """Parts, joined by commas"""
    processes: int = 2
    """Processes that read damaged files, or run commands, at a time"""
    only: str = ""
    """Only readers and commands whose names hold this"""
    soak_minutes: float | None = None
    """How long the soak takes; default: its share of the time, at most 10"""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.chosen) - set(SHARES))
        if unknown or not self.chosen:
            raise ConfigError(f"--parts: expected some of {','.join(SHARES)}, got {self.parts!r}")
        if self.seconds <= 0 or self.processes < 1:
            raise ConfigError("--seconds and --processes: expected positive numbers")

    def within_the_time(self) -> list[str]:
        """The chosen parts for which the time is enough."""
        is_short = self.seconds < _SOAK_SECONDS and self.soak_minutes is None and self.chosen != ["soak"]
        return [part for part in self.chosen if not (is_short and part == "soak")]

    @property
    def chosen(self) -> list[str]:
        return [part.strip() for part in self.parts.split(",") if part.strip()]


def run(options: Options) -> int:
    from faults import shim

    if {"kills", "disk"} & set(options.chosen):
        shim.load_before_all()
    until = time.monotonic() + options.seconds
    results = []
    waiting = options.within_the_time()
    while waiting:
        # What one part takes too long, those after it have less.
        share = SHARES[waiting[0]] / sum(SHARES[part] for part in waiting)
        part = waiting.pop(0)
        counts = PARTS[part](options, max(0.0, until - time.monotonic()) * share)
        print(counts, flush=True)
        results.append(counts)
    print("----")
    for counts in results:
        print(counts)
    return 1 if any(counts.faults for counts in results) else 0


def _fuzz(options: Options, seconds: float) -> "Counts":
    from faults.fuzz import fuzz

    return fuzz(seconds, seed=options.seed, processes=options.processes, only=options.only)


def _kills(options: Options, seconds: float) -> "Counts":
    from faults.writers import kill

    return kill(seconds, seed=options.seed, processes=options.processes, only=options.only)


def _disk(options: Options, seconds: float) -> "Counts":
    from faults.writers import fail

    return fail(seconds, seed=options.seed, processes=options.processes, only=options.only)


def _http(options: Options, seconds: float) -> "Counts":
    from faults.hostile import attack

    return attack(seconds, seed=options.seed)


def _soak(options: Options, seconds: float) -> "Counts":
    from faults.hostile import soak

    minutes = min(seconds / 60, 10.0) if options.soak_minutes is None else options.soak_minutes
    return soak(minutes)


PARTS: dict[str, Callable[[Options, float], "Counts"]] = {
    "fuzz": _fuzz,
    "kills": _kills,
    "disk": _disk,
    "http": _http,
    "soak": _soak,
}


def main(args: Sequence[str] | None = None) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
