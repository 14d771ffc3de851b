"""Damaged files for every reader, in forked children: a value or one sentence, no traceback, no signal, no hang."""

import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from faults.counts import Counts
from faults.forked import SECONDS, reports
from faults.readers import READERS, Inputs, Reader, quiet

# Inputs of a reader before the next has its turn, and seconds.
_ROUND, _ROUND_SECONDS = 100, 2.0


def fuzz(seconds: float, *, seed: int, processes: int, only: str = "") -> Counts:
    """Damages files for `seconds`, in so many processes, each reader with its share of the time."""
    total = Counts("fuzz")
    begin = time.monotonic()
    work = partial(_work, seconds=seconds, seed=seed, processes=processes, only=only)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for counts, lines in pool.map(work, range(processes)):
            total.inputs += counts.inputs
            total.found += counts.found
            print("\n".join(lines), flush=True)
    total.seconds = time.monotonic() - begin
    return total


def _work(worker: int, *, seconds: float, seed: int, processes: int, only: str) -> tuple[Counts, list[str]]:
    """Every `processes`-th input from `worker` on, and what was taken of each reader."""
    counts = Counts("fuzz")
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        worlds = [
            World(reader, Path(root) / str(number), seed, range(worker, 10**9, processes))
            for number, reader in enumerate(READERS)
            if only in reader.name
        ]
        while time.monotonic() < until or not all(world.taken for world in worlds):
            min(worlds, key=lambda one: one.seconds / one.reader.weight).go_on(counts, until)
    return counts, [f"[fuzz] {one.reader.name}: {one.taken} inputs, {one.seconds:.0f} s" for one in worlds]


class World:
    """A reader, its valid files, and how far it has come."""

    def __init__(
        self, reader: Reader, folder: Path, seed: int, numbers: Iterable[int], *, seconds: float = SECONDS
    ) -> None:
        self.reader, self.folder, self.seed, self._limit = reader, folder, seed, seconds
        self.taken, self.seconds = 0, 0.0
        self._numbers: Iterator[int] = iter(numbers)
        self._left: list[int] = []
        self._inputs: Inputs | None = None
        self._sound = ""

    def go_on(self, counts: Counts, until: float = float("inf")) -> None:
        """Takes the next inputs; makes the valid files first."""
        inputs = self.inputs()
        begin = time.monotonic()
        take = partial(inputs.take, sound=self._sound)
        numbers = [*self._left, *islice(self._numbers, _ROUND - len(self._left))]
        self._left = []
        for done, report in enumerate(reports(take, numbers, seconds=self._limit), start=1):
            number, line, number_of_signal = report
            self.taken += 1
            where = f"{self.reader.name}, seed {self.seed}, input {number}"
            if line is None:
                name = signal.Signals(number_of_signal).name if number_of_signal else "did not end in time"
                counts.add("signal", f"{where}: {name}")
            else:
                outcome, _, what = line.partition("\t")
                counts.add(outcome, f"{where}: {what}")  # type: ignore[arg-type]
            if time.monotonic() > min(until, begin + _ROUND_SECONDS):
                self._left = numbers[done:]
                break
        inputs.restore()
        self.seconds += time.monotonic() - begin

    def inputs(self) -> Inputs:
        """The inputs over the valid files, which a child makes: nothing that it starts stays in this process."""
        if self._inputs is None:
            self.folder.mkdir(parents=True)
            _once(lambda: self.reader.make(self.folder), f"{self.reader.name}: its files cannot be made")
            self._inputs = inputs = Inputs(self.reader, self.folder, self.seed)
            self._sound = _once(inputs.value, f"{self.reader.name}: its valid files cannot be read")
        return self._inputs


def _once(do: Callable[[], object], what: str) -> str:
    def take(_: int) -> str:
        try:
            with quiet():
                return f"done\t{do()}"
        except BaseException as error:
            return f"failed\t{''.join(traceback.format_exception(error))[-1500:]}"

    ((_, line, number_of_signal),) = reports(take, [0], seconds=300)
    state, _, value = (line or f"signal {number_of_signal}\t").partition("\t")
    if state != "done":
        raise RuntimeError(f"{what}: {line or state}")
    return value
