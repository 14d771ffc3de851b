"""Damaged files for every reader, in forked children: a value or one sentence, no traceback, no signal, no hang."""

import importlib
import multiprocessing
import random
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path

from faults.counts import Counts
from faults.forked import SECONDS, reports
from faults.readers import READERS, Inputs, Reader, quiet

# Inputs of a reader before the next has its turn, and seconds; fewer where the time is short.
_ROUND, _ROUND_SECONDS = 100, 2.0
# With less in all, only readers that need no slow import.
_SLOW_SECONDS = 120


def fuzz(seconds: float, *, seed: int, processes: int, only: str = "") -> Counts:
    """Damages files for `seconds`, in so many processes, each with readers of its own, and these with their shares.

    The seed says their order, for a time that is too short for all; with little of it the slow ones are left out.
    """
    total = Counts("fuzz")
    begin = time.monotonic()
    chosen = [reader for reader in READERS if only in reader.name]
    random.Random(seed).shuffle(chosen)
    quick = [reader for reader in chosen if not reader.imports]
    if quick and seconds < _SLOW_SECONDS:
        print(f"[fuzz] too little time for {', '.join(one.name for one in chosen if one.imports)}", flush=True)
        chosen = quick
    chosen.sort(key=lambda one: bool(one.imports))
    processes = min(processes, len(chosen))
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        work = partial(
            _work, root=Path(root), names=[one.name for one in chosen], seconds=seconds, seed=seed, processes=processes
        )
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            for counts, lines in pool.map(work, range(processes)):
                total.merge(counts)
                print("\n".join(lines), flush=True)
    total.seconds = time.monotonic() - begin
    return total


def _work(
    worker: int, *, root: Path, names: list[str], seconds: float, seed: int, processes: int
) -> tuple[Counts, list[str]]:
    """Every `processes`-th reader from `worker` on, and what was taken of each."""
    counts = Counts("fuzz")
    until = time.monotonic() + seconds
    readers = {one.name: one for one in READERS}
    mine = [readers[name] for name in names[worker::processes]]
    a_round = min(_ROUND_SECONDS, seconds / (2 * len(mine)))
    worlds = [World(one, root / re.sub(r"\W+", "-", one.name), seed, count(), a_round=a_round) for one in mine]
    while time.monotonic() < until:
        min(worlds, key=lambda one: one.seconds / one.reader.weight).go_on(counts, until)
    return counts, [f"[fuzz] {one.reader.name}: {one.taken} inputs, {one.seconds:.0f} s" for one in worlds]


class World:
    """A reader, its valid files, and how far it has come."""

    def __init__(
        self,
        reader: Reader,
        folder: Path,
        seed: int,
        numbers: Iterable[int],
        *,
        seconds: float = SECONDS,
        a_round: float = _ROUND_SECONDS,
    ) -> None:
        self.reader, self.folder, self.seed, self._limit, self._round = reader, folder, seed, seconds, a_round
        self.taken, self.seconds = 0, 0.0
        self._numbers: Iterator[int] = iter(numbers)
        self._left: list[int] = []
        self._inputs: Inputs | None = None
        self._sound = ""

    def go_on(self, counts: Counts, until: float = float("inf")) -> None:
        """Takes the next inputs; makes the valid files first."""
        begin = time.monotonic()
        inputs = self.inputs()
        ready = time.monotonic()
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
            if time.monotonic() > min(until, ready + self._round):
                self._left = numbers[done:]
                break
        inputs.restore()
        self.seconds += time.monotonic() - begin

    def inputs(self) -> Inputs:
        """The inputs over the valid files, which a child makes: nothing that it starts stays in this process."""
        if self._inputs is None:
            self.folder.mkdir(parents=True)
            for module in self.reader.imports:
                importlib.import_module(module)
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
