"""Measures this package on a GPU in twelve minutes, the most important first, and writes it into `docs/gpu.md`:

python benchmarks/gpu.py --output docs/gpu.md
python benchmarks/gpu.py --peaks --output docs/gpu.md    # only the peaks of memory; a pretend GPU has them too

What no longer fits into --minutes is left out, and the page says so. `--device cpu --smoke` runs everything in seconds
with tiny models; its numbers mean nothing.
"""

import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_page  # noqa: E402
import gpu_work  # noqa: E402
import torch  # noqa: E402
from gpu_work import Bench, Row  # noqa: E402

from cn_clip import command, ranks, zoo  # noqa: E402
from cn_clip.errors import ConfigError, lacked_memory  # noqa: E402
from cn_clip.files import atomic_write  # noqa: E402
from cn_clip.settings import Range, check  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Peak of the device, steps of training, extraction, texts, copies and the loader; medians after a warm-up."""

    device: str = "cuda"
    """Where"""
    minutes: Annotated[float, Range(above=0)] = 12.0
    """Time for everything; what does not fit is left out"""
    reference_python: Path | None = None
    """The interpreter of an environment with cn_clip 1.6.0 and CUDA, for its steps in the same turns"""
    peaks: bool = False
    """Measure only the peaks of memory of training, by model and batch"""
    output: Path | None = None
    """A page whose block is replaced, with the same numbers beside it as .json and a picture; default: only printed"""
    smoke: bool = False
    """Tiny models and few repeats: shows that everything runs"""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Measure:
    """A table, or some rows of it: its part of the page, its name in messages, what it may take, how it is done."""

    part: str
    name: str
    seconds: float
    work: Callable[[], list[Row]]


class Budget:
    """How much of the time is left."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def fits(self, seconds: float) -> bool:
        """Whether work of that length ends in time."""
        return self._clock() + seconds <= self._end


def run(options: Options) -> None:
    device = ranks.choose_device(options.device)
    bench = Bench(device, smoke=options.smoke, precision="fp32" if options.smoke else "bf16")
    budget = Budget(60 * options.minutes)
    with contextlib.ExitStack() as stack:
        if options.smoke:
            stack.enter_context(without_compiler())
        reference = None
        if options.reference_python is not None and not options.peaks:
            reference = stack.enter_context(Reference(options.reference_python, bench))
        measures = memory_measures(bench) if options.peaks else all_measures(bench, reference)
        found = carried_out(measures, budget)
    found["machine"] = machine(device)
    if options.output is None:
        print(gpu_page.block(found, gpu_page.ENGLISH))
        return
    kind = "peaks" if options.peaks else "speed"
    english = options.output.parent / "en" / options.output.name
    for page, words in ((options.output, gpu_page.CHINESE), (english, gpu_page.ENGLISH)):
        gpu_page.put(page, gpu_page.block(found, words), kind=kind)
    with atomic_write(options.output.with_name(f"{options.output.stem}-{kind}.json")) as stream:
        json.dump(found, stream, ensure_ascii=False, indent=1)
        stream.write("\n")
    if not options.peaks:
        gpu_page.draw(options.output.with_name(f"{options.output.stem}-speed.svg"), found)


def all_measures(bench: Bench, reference: "Reference | None") -> list[Measure]:
    """What is measured, the most important first, with the seconds that it may take on a GPU of 2020 or later."""
    sizes: tuple[int, ...] = bench.pick((256, 64, 1024), (4, 2))
    ask = None if reference is None else reference.ask
    more = 0 if reference is None else 40
    steps = [
        Measure("step", f"{pairs} pairs", 90 + more, partial(gpu_work.step_times, bench, pairs, ask)) for pairs in sizes
    ]
    return [
        Measure("device", "peak of the device", 15, partial(gpu_work.matmul, bench)),
        *steps,
        Measure("extraction", "extraction", 60, partial(gpu_work.extraction, bench)),
        Measure("texts", "texts of many lengths", 60, partial(gpu_work.texts, bench)),
        Measure("transfer", "host to device", 10, partial(gpu_work.transfer, bench)),
        Measure("parts", "parts of the towers", 20, partial(gpu_work.parts, bench)),
        Measure("loader", "steps fed by the loader", 90, partial(gpu_work.loader_step, bench)),
    ]


def memory_measures(bench: Bench) -> list[Measure]:
    models = {bench.towers[0]: bench.towers[1]} if bench.smoke else gpu_work.LARGE
    batches: tuple[int, ...] = bench.pick((64, 256, 1024), (2, 4))
    measures = []
    for vision, text in models.items():
        for checkpointing in (False, True):
            work = partial(gpu_work.peak_row, bench, vision, text, checkpointing=checkpointing, batches=batches)
            name = f"{vision}{' --grad-checkpointing' if checkpointing else ''}"
            measures.append(Measure("peaks", name, 30, partial(as_rows, work)))
    return measures


def as_rows(work: Callable[[], Row]) -> list[Row]:
    return [work()]


def carried_out(measures: list[Measure], budget: Budget) -> dict[str, Any]:
    """The rows of each part, and what was left out and why."""
    found: dict[str, Any] = {"parts": {}, "left_out": []}
    for measure in measures:
        if not budget.fits(measure.seconds):
            found["left_out"].append(f"{measure.name}: no time")
            continue
        started = time.monotonic()
        try:
            rows = measure.work()
        except RuntimeError as error:
            if not lacked_memory(error):
                raise
            found["left_out"].append(f"{measure.name}: out of memory")
            rows = []
        found["parts"].setdefault(measure.part, []).extend(rows)
        print(f"{measure.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return found


def without_compiler() -> AbstractContextManager[object]:
    """Compiled code runs as it is written: compiling takes longer than all the rest of a smoke run."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    names = ("torch", "numpy", "pillow")
    facts: dict[str, Any] = {"date": date.today().isoformat(), "python": platform.python_version()}
    facts |= {name: version(name) for name in names}
    if device.type != "cuda":
        return {"device": ranks.processor()[0], **facts}
    properties = torch.cuda.get_device_properties(device)
    facts["driver"] = driver()
    facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    facts["memory_gib"] = round(properties.total_memory / gpu_work.GIB, 1)
    return {"device": properties.name, **facts}


def driver() -> str:
    """Its version, as `nvidia-smi` tells it."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=True, encoding="utf-8")
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class Reference:
    """The original in a process of its own, which computes when it is asked."""

    def __init__(self, python: Path, bench: Bench) -> None:
        settings = {
            "info": zoo.model_config(*bench.towers).info(),
            "device": bench.device.type,
            "longest": gpu_work.LONGEST,
            "repeats": bench.pick(5, 1),
        }
        line = [str(python), str(ROOT / "benchmarks" / "gpu_reference.py"), json.dumps(settings)]
        self._line = line

    def __enter__(self) -> "Reference":
        # Without PYTHONPATH, which would have it import this package under the name of the original.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._line, stdin=pipe, stdout=pipe, env=own, text=True, encoding="utf-8")
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, pairs: int) -> dict[str, Any]:
        """Seconds of some steps with so many pairs, and the peak of memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pairs}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                content: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return content
        raise ConfigError("--reference-python: its process ended; what it said stands above")


if __name__ == "__main__":
    command.execute(run, Options)
