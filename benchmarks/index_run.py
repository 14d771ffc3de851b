"""An index of many pictures: time, memory, what a second run costs, and that no interruption loses what was reported.

python benchmarks/index_run.py
"""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.errors import DataError  # noqa: E402
from cn_clip.retrieval.store import Index, open_index  # noqa: E402

IN_A_FOLDER = 500
SIZE = (256, 192)
# A second run, imports included.
GOAL_CPU_SECONDS = 5.0
# Vectors of the same picture differ so much by the rounding of batches of other sizes.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Options:
    """Measures `cn-clip index build`; exits with 1 when something was lost, or a second run costs too much."""

    pictures: int = 20_000
    """How many pictures to make and index."""
    interrupts: int = 20
    """How many runs of a second index to end at random times, by turns with SIGKILL and Ctrl-C."""
    model: str = "Emoji-Tiny"
    """The model."""
    seed: int = 0
    """Of the pictures and of the times."""
    python: str = sys.executable
    """The interpreter that runs the command."""
    json: bool = False
    """Print the result as one JSON object"""


@dataclass(frozen=True)
class Run:
    """How a run ended: its status, less than 0 for a signal; what it printed; what it took."""

    status: int
    lines: list[str]
    seconds: float
    cpu_seconds: float
    peak_mib: float

    @property
    def done(self) -> int:
        """The pictures that it last reported to be safe."""
        return max(
            (int(found[1]) for found in map(re.compile(r"(?:已完成 )?(\d+) / \d+").match, self.lines) if found),
            default=0,
        )


def make_pictures(folder: Path, count: int, seed: int) -> None:
    """Different small photographs, so to speak: soft patches of colour as JPEGs, 500 in a folder."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        path = folder / f"{number // IN_A_FOLDER:03d}" / f"IMG_{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        patches = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        patches.resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=85)


def run(options: Options, pictures: Path, index: Path, *, end: tuple[int, float] | None = None) -> Run:
    """Builds the index; end: the number of a signal, and after how many seconds it is sent."""
    words = [options.python, "-m", "cn_clip", "index", "build", str(pictures), "--output", str(index)]
    words += ["--model", options.model, "--commit-every", "500"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        with subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env) as process:
            if end is not None:
                try:
                    process.wait(end[1])
                except subprocess.TimeoutExpired:
                    process.send_signal(end[0])
            status = process.wait()
        out.seek(0)
        lines = out.read().splitlines()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(status, lines, time.monotonic() - begun, cpu, after.ru_maxrss / 1024)


def whole(done: Run) -> Run:
    """The run; raises DataError with its last lines when it did not end well."""
    if done.status:
        raise DataError("the run failed: " + " | ".join(done.lines[-3:]))
    return done


def items(folder: Path) -> Index | None:
    """None where there is no index yet."""
    return open_index(folder) if (folder / "manifest.json").is_file() else None


def interrupted(options: Options, pictures: Path, index: Path, *, start: float, work: float) -> Iterator[str]:
    """Ends runs at random times, and then lets one end by itself; what was wrong, a line each.

    start, work: seconds until an undisturbed run computes, and those that it does.
    """
    chance = random.Random(options.seed)
    before: dict[object, bytes] = {}
    for number in range(options.interrupts):
        sent = (signal.SIGKILL, signal.SIGINT)[number % 2]
        # Some before anything is computed; the others do some of the work each.
        after = chance.uniform(0.5 * start, start + 2 * work / options.interrupts)
        end = run(options, pictures, index, end=(sent, after))
        found = items(index)
        count = 0 if found is None else len(found)
        name = signal.Signals(sent).name
        print(f"{name} {after:.1f} s: status {end.status}, reported {end.done}, kept {count}", file=sys.stderr)
        if count < end.done:
            yield f"{name}: {end.done} were reported, {count} are there"
        if end.status not in (0, -sent, 128 + sent):
            yield f"{name}: the status is {end.status}: {' | '.join(end.lines[-3:])}"
        now = {} if found is None else {one: found.vector(one).tobytes() for one in found.ids}
        if any(now.get(one) != row for one, row in before.items()):
            yield f"{name}: items of the run before are gone, or changed"
        before = now
    last = run(options, pictures, index)
    if last.status:
        yield f"the last run failed: {' | '.join(last.lines[-3:])}"


def differences(index: Index, other: Index) -> Iterator[str]:
    """Where two indexes of the same pictures differ."""
    if sorted(map(str, index.ids)) != sorted(map(str, other.ids)):
        yield f"{len(index)} and {len(other)} items, or others"
        return
    worst = max(float(np.abs(index.vector(one) - other.vector(one)).max()) for one in index.ids)
    if worst > TOLERANCE:
        yield f"vectors differ by {worst:g}"
    if any(index.thumbnail(one) != other.thumbnail(one) for one in index.ids):
        yield "thumbnails differ"
    if any(index.metadata(one) != other.metadata(one) for one in index.ids):
        yield "metadata differ"


def measure(options: Options) -> int:
    """Prints what was found; returns 1 when a goal is missed."""
    say = command.Speaker(quiet=options.json)
    with tempfile.TemporaryDirectory(prefix="index-run-") as name:
        pictures, index, other = (Path(name, part) for part in ("pictures", "index", "interrupted"))
        make_pictures(pictures, options.pictures, options.seed)
        few = Path(name, "few")
        make_pictures(few, 1, options.seed)
        start = whole(run(options, few, Path(name, "start"))).seconds
        first = whole(run(options, pictures, index))
        again = whole(run(options, pictures, index))
        faults = list(interrupted(options, pictures, other, start=start, work=first.seconds - start))
        faults += differences(open_index(index), open_index(other))
        size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
        result = {
            "pictures": options.pictures,
            "seconds": round(first.seconds, 1),
            "cpu_seconds": round(first.cpu_seconds, 1),
            "peak_mib": round(first.peak_mib),
            "index_mib": round(size / 2**20, 1),
            "again_seconds": round(again.seconds, 2),
            "again_cpu_seconds": round(again.cpu_seconds, 2),
            "interrupts": options.interrupts,
            "faults": faults,
        }
        for key, value in result.items():
            say(f"{key:18} {value}")
        say.result(result)
        is_lost = bool(faults) or len(open_index(index)) != options.pictures
        return int(is_lost or again.cpu_seconds > GOAL_CPU_SECONDS)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(measure, Options, args)


if __name__ == "__main__":
    main()
