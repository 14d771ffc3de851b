"""Every command that writes, ended at any moment or refused by the disk: then what is there is whole, and the same
command again gives what an undisturbed run gives."""

import contextlib
import gc
import hashlib
import importlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

import lmdb
import numpy as np
import torch
from command_lines import LINES, MODEL, SMALL_RUN, with_index, writing_commands
from faults import shim
from faults.counts import Counts
from faults.forked import limit_memory
from faults.small_towers import TEXT, VISION, shrink

from cn_clip import cli
from cn_clip.processes import compute_alone_in_children
from cn_clip.retrieval.store import open_index

# What commands import when they run: once, here, rather than in each child.
_PRELOADED = (
    "torch._dynamo",
    "torch.utils.serialization",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "numpy.random",
    "PIL.ImageFont",
    "PIL.ImageMath",
    "safetensors.torch",
    "tokenizers",
    "cn_clip.checkpoints.weights",
    "cn_clip.clip.backends.export",
    "cn_clip.clip.backends.pytorch",
    "cn_clip.data.building",
    "cn_clip.data.captions",
    "cn_clip.data.datasets",
    "cn_clip.evaluation.classification",
    "cn_clip.evaluation.logistic",
    "cn_clip.evaluation.retrieval",
    "cn_clip.features.extraction",
    "cn_clip.index.building",
    "cn_clip.index.repairing",
    "cn_clip.index.searching",
    "cn_clip.report.findings",
    "cn_clip.report.page",
    "cn_clip.training.building",
    "cn_clip.training.curves",
)
_NEVER_ENDS = 600.0
_ADDED = ("b.png", "c.png")
_TIMES = re.compile(r"\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d")
# Locks and notes of digests stay; logs grow with every start.
_PASSED_OVER = (
    "*.lock",
    "lock.mdb",
    ".lock",
    ".verified.json",
    "out_*.log",
    "params_*.txt",
    "metrics*.jsonl",
    "curves*",
)


def _lines() -> dict[str, str]:
    """The arguments of each command, as `command_lines` has them.

    But for those that take minutes or a network, or never end.
    """
    left_out = {"demo", "models", "download", "serve", "bench", "export tensorrt", "export coreml", "export onnx"}
    left_out |= {"index watch"}  # what it writes, index build does
    chosen = {name: LINES[name].arguments for name in writing_commands() if name not in left_out}
    small = f"{SMALL_RUN} --vision-model {VISION} --text-model {TEXT} --save-step-frequency 1"
    chosen["train"] = f"--train-data {{lmdb}} --logs {{out}} --name x {small}"
    chosen["index check"] = "{index} --repair"
    chosen["features npz"] = LINES["features"].arguments.replace("{out}", "{out}.npz").replace("{out2}", "{out2}.npz")
    chosen["linear-probe"] = (
        f"--checkpoint {{checkpoint}} --train {{classes}} --test {{classes2}} --cache {{out}} {MODEL}"
    )
    return chosen


@dataclass(frozen=True)
class Ended:
    """How a run of a command ended: its exit status, less than 0 for a signal, and all that it printed."""

    status: int
    said: str
    seconds: float
    calls: int = 0

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said


@dataclass
class Bench:
    """A command, its folder, and what undisturbed runs leave there."""

    name: str
    words: list[str]
    folder: Path
    prepare: Callable[[], None]
    whole: dict[str, str] = field(default_factory=dict)
    unstable: set[str] = field(default_factory=set)
    seconds: float = 0.0
    calls: int = 0
    replaces: bool = False
    spent: float = 0.0

    def measure(self) -> str:
        """Two undisturbed runs, and a third over the result of the second; what the first says when it fails."""
        self.prepare()
        first = run(self.words, self.folder, count=True)
        if first.status:
            return first.said[-800:]
        self.whole, self.calls = tree(self.folder), first.calls
        self.prepare()
        self.seconds = run(self.words, self.folder).seconds
        second = tree(self.folder)
        self.unstable = {name for name in self.whole if self.whole[name] != second.get(name)}
        self.replaces = run(self.words, self.folder).status == 0 and not self.differs()
        return ""

    def differs(self, *, between: bool = False, may_lack: bool = False) -> str:
        """What is not as after an undisturbed run; empty when nothing is.

        between: before the command has run again, when hidden files and rows to go on from may be left. may_lack: files
        may be missing.
        """
        found = tree(self.folder)
        if between:
            found = {name: one for name, one in found.items() if not _is_hidden(name) and not name.endswith(".partial")}
        for name in sorted({*found, *self.whole}):
            if name not in found and not may_lack:
                return f"{name} is missing"
            if name in found and name not in self.whole:
                return f"{name} is left over"
            if name in found and found[name] == "unreadable":
                return f"{name} cannot be read"
            if name in found and name not in self.unstable and found[name] != self.whole[name]:
                return f"{name} differs"
        return ""

    def lost(self) -> str:
        """What of an index that the command changes is gone; empty when nothing is."""
        copy, kept = self.folder / "copy.index", {"a.png", "b.png", "c.png", "d.png"}
        if self.name == "index add":
            kept -= set(_ADDED)
        if not copy.is_dir() or self.name == "index remove":
            return ""
        try:
            missing = kept - set(open_index(copy).ids)
        except Exception as error:
            # What is to be repaired cannot be opened until it is.
            return "" if self.name == "index check" else f"the index cannot be opened: {error}"
        return f"the items {sorted(missing)} are gone" if missing else ""


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def tree(folder: Path) -> dict[str, str]:
    """Name -> digest of what every file means; names and texts without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(fnmatch(path.name, one) for one in _PASSED_OVER):
            found[_TIMES.sub("TIME", path.relative_to(folder).as_posix())] = _meaning(path)
    return found


def _meaning(path: Path) -> str:
    data = path.read_bytes()
    try:
        if data[:2] == b"PK":
            data = _tensors(path)
        elif path.name == "data.mdb":
            data = _records(path.parent)
    except Exception:
        return "unreadable"
    return hashlib.sha256(data).hexdigest()


def _records(folder: Path) -> bytes:
    """The records of an LMDB: unused parts of its pages hold what was in memory."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return repr(list(transaction.cursor())).encode()


def _tensors(path: Path) -> bytes:
    """The values of an archive of arrays: its bytes hold the time."""
    with zipfile.ZipFile(path) as archive:
        is_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    if not is_torch:
        with np.load(path) as arrays:
            return b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays.files))
    content = torch.load(path, weights_only=True, map_location="cpu")
    content = {key: value for key, value in content.items() if key in ("state_dict", "epoch", "step")}
    stream = io.BytesIO()
    for name, value in sorted(content["state_dict"].items()):
        stream.write(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return stream.getvalue() + repr((content.get("epoch"), content.get("step"))).encode()


# --- runs -------------------------------------------------------------------------------------------------------------


def run(
    words: Sequence[str],
    folder: Path,
    *,
    kill_after: float | None = None,
    arm: Callable[[], None] | None = None,
    count: bool = False,
) -> Ended:
    """Runs a command in a forked child. kill_after: seconds; arm: done in the child before; count: its calls."""
    said = folder.parent / "said"
    begin = time.monotonic()
    pid = os.fork()
    if not pid:
        _command(words, said, folder, arm, count)
    deadline = begin + (_NEVER_ENDS if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            break
        time.sleep(0.0005 if kill_after is not None else 0.005)
    seconds = time.monotonic() - begin
    text = said.read_text(encoding="utf-8", errors="replace")
    counted = re.search(r"\ncalls (\d+)\n$", text)
    return Ended(os.waitstatus_to_exitcode(status), text, seconds, int(counted[1]) if counted else 0)


def _command(
    words: Sequence[str], said: Path, folder: Path, arm: Callable[[], None] | None, count: bool
) -> "None":  # pragma: no cover - in a child
    status = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        limit_memory(4 << 30)
        if count and shim.is_loaded():
            shim.arm(folder, shim.CHANGES, 0)
        if arm is not None:
            arm()
        try:
            cli.main(list(words))
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        if count and shim.is_loaded():
            print(f"\ncalls {shim.seen()}", flush=True)
        os._exit(status)
    finally:
        os._exit(status)


def benches(root: Path, paths: dict[str, Path], only: str) -> Iterator[Bench]:
    """The commands whose names hold `only`, each with a folder of its own."""
    for number, (name, arguments) in enumerate(_lines().items()):
        if only not in name:
            continue
        folder = root / f"{number:02}" / "work"
        folder.mkdir(parents=True)
        words = _words(name, arguments, paths, folder)

        def prepare(folder: Path = folder, name: str = name) -> None:
            shutil.rmtree(folder)
            folder.mkdir()
            if name == "linear-probe":
                (folder / "out.out").mkdir()
            if name.startswith("index ") and "build" not in name:
                shutil.copytree(paths["index"], folder / "copy.index")
                if name == "index add":  # something to add
                    with contextlib.redirect_stdout(io.StringIO()):
                        cli.main(["index", "remove", str(folder / "copy.index"), *_ADDED])
                if name == "index check":  # something to repair
                    next((folder / "copy.index").glob("segment-*/thumbnails*")).write_bytes(b"")

        yield Bench(name, words, folder, prepare)


def _words(name: str, arguments: str, paths: dict[str, Path], folder: Path) -> list[str]:
    slots = dict.fromkeys(re.findall(r"\{(\w+)\}", arguments))
    values = {slot: str(paths.get(slot, folder / f"out.{slot}")) for slot in slots}
    if name.startswith("index ") and "index" in values:
        values["index"] = str(folder / "copy.index")
    command = {"features npz": "features"}.get(name, name)
    return [*command.split(), *(word.format(**values) for word in arguments.split())]


# --- kills and faults -------------------------------------------------------------------------------------------------

Attempt = Callable[[Bench, random.Random, Counts], None]
_benches: list[Bench] = []  # those of a part, for the processes that it forks


def kill(seconds: float, *, seed: int, processes: int, only: str = "") -> Counts:
    """Kills commands at random times, and at random calls that change files."""
    return _share(Counts("kills"), _killed, seconds, seed=seed, processes=processes, only=only)


def fail(seconds: float, *, seed: int, processes: int, only: str = "") -> Counts:
    """Lets calls of commands fail as on a disk that is full, read-only or broken."""
    if not shim.is_loaded():
        return Counts("disk")
    return _share(Counts("disk"), _failed, seconds, seed=seed, processes=processes, only=only)


def _share(total: Counts, attempt: Attempt, seconds: float, *, seed: int, processes: int, only: str) -> Counts:
    begin = time.monotonic()
    _load()
    until = begin + seconds
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        paths = _world(Path(root) / "world")
        found = list(benches(Path(root), paths, only))
        random.Random(seed).shuffle(found)
        _benches[:] = found
        work = partial(_work, part=total.part, attempt=attempt, until=until, seed=seed)
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            for counts, lines in pool.map(partial(work, processes=processes), range(processes)):
                total.merge(counts)
                print("\n".join(lines), flush=True)
    total.seconds = time.monotonic() - begin
    return total


@cache
def _load() -> None:
    """Imports what commands need, so that every child begins with it."""
    for module in _PRELOADED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    compute_alone_in_children()
    shrink()
    gc.freeze()


def _work(
    worker: int, *, part: str, attempt: Attempt, until: float, seed: int, processes: int
) -> tuple[Counts, list[str]]:
    """Every `processes`-th command from `worker` on; those that took least time so far are next."""
    counts = Counts(part)
    mine = _benches[worker::processes]
    taken = dict.fromkeys((one.name for one in mine), 0)
    while mine and time.monotonic() < until:
        bench = min(mine, key=lambda one: one.spent)
        begin = time.monotonic()
        if not bench.whole and (failed := bench.measure()):
            counts.add("traceback", f"{bench.name}, undisturbed: {failed}")
            mine.remove(bench)
            continue
        attempt(bench, random.Random(f"{seed}/{part}/{bench.name}/{taken[bench.name]}"), counts)
        taken[bench.name] += 1
        bench.spent += time.monotonic() - begin
    lines = [f"[{part}] {one.name}: {taken[one.name]} times, {one.seconds:.1f} s, {one.calls} calls" for one in mine]
    return counts, lines


def _world(folder: Path) -> dict[str, Path]:
    """The files that commands read, made in a child: what it starts is not this process's."""
    folder.mkdir(parents=True)
    made = run_alone(lambda: print(repr({name: str(path) for name, path in with_index(folder).items()})), folder)
    paths: dict[str, str] = eval(made.strip().splitlines()[-1])
    return {name: Path(path) for name, path in paths.items()}


def run_alone(do: Callable[[], object], folder: Path) -> str:
    """What `do` prints, in a forked child."""
    place = folder.with_name(folder.name + ".said")
    pid = os.fork()
    if not pid:
        with open(place, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            try:
                do()
            except BaseException:
                traceback.print_exc(file=stream)
        os._exit(0)
    os.waitpid(pid, 0)
    return place.read_text(encoding="utf-8")


def _killed(bench: Bench, rng: random.Random, counts: Counts) -> None:
    was_there = _begin(bench, rng)
    if shim.is_loaded() and bench.calls and rng.random() < 0.5:
        at, after = rng.randint(1, bench.calls), rng.random() < 0.5
        what = f"killed {'after' if after else 'before'} call {at} of {bench.calls}"
        ended = run(bench.words, bench.folder, arm=partial(shim.arm, bench.folder, shim.CHANGES, at, after=after))
    else:
        wait = rng.uniform(0, bench.seconds)
        what = f"killed after {wait:.3f} s"
        ended = run(bench.words, bench.folder, kill_after=wait)
    counts.killed += ended.status == -signal.SIGKILL
    _judge(bench, ended, counts, what, was_there=was_there, is_killed=True)


def _failed(bench: Bench, rng: random.Random, counts: Counts) -> None:
    was_there = _begin(bench, rng)
    fault = rng.choice(list(shim.FAULTS))
    which, error, lasting = shim.FAULTS[fault]
    at = rng.randint(1, max(bench.calls, 1))
    arm = partial(shim.arm, bench.folder, which, at, error=error, lasting=lasting)
    ended = run(bench.words, bench.folder, arm=arm)
    what = f"{fault} from call {at}" if lasting else f"{fault} at call {at}"
    _judge(bench, ended, counts, what, was_there=was_there, is_killed=False)


def _begin(bench: Bench, rng: random.Random) -> bool:
    """An empty folder, or the result of a run before; whether it is that."""
    bench.prepare()
    was_there = bench.replaces and not bench.name.startswith("index ") and rng.random() < 0.5
    if was_there:
        run(bench.words, bench.folder)
    return was_there


def _judge(bench: Bench, ended: Ended, counts: Counts, what: str, *, was_there: bool, is_killed: bool) -> None:
    """Counts what a disturbed run left, and what the same command makes of it."""
    where = f"{bench.name} {'over a result ' if was_there else ''}{what}"
    if ended.has_traceback:
        return counts.add("traceback", f"{where}: {ended.said[-600:]}")
    if ended.status < 0 and not is_killed:
        return counts.add("signal", f"{where}: signal {-ended.status}")
    gone = bench.differs(between=True, may_lack=not was_there)
    if gone and bench.name not in _BY_PARTS:
        return counts.add("lost" if was_there else "difference", f"{where}: {gone}")
    if lost := bench.lost():
        return counts.add("lost", f"{where}: {lost}")
    again = run(bench.words, bench.folder)
    if again.has_traceback:
        return counts.add("traceback", f"{where}, then again: {again.said[-600:]}")
    if again.status < 0:
        return counts.add("signal", f"{where}, then again: signal {-again.status}")
    # A refusal, such as of files that are there already, changes nothing.
    if gone := bench.differs(between=again.status > 0):
        return counts.add("difference", f"{where}, then again (status {again.status}): {gone}: {again.said[-200:]}")
    counts.add("sentence" if ended.status > 0 else "fine", "")


# These change a folder step by step; what is in between is looked at by `Bench.lost`.
_BY_PARTS = ("train", "index build", "index add", "index remove", "index check", "zeroshot", "evaluate", "linear-probe")
