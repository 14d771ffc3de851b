"""Counts what each step of training, and a whole process, makes the pretend GPU do.

A step lasts from the call of `Trainer._step` to the next: the loader and the copies of the next batch belong to it,
validation and saving do not. What a process counted is one line of JSON, written by `report`.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# The steps that are looked at: the first ones fill caches. Numbered from 1.
FIRST, LAST = 3, 6
ASIDE = ("validate", "_write", "_save", "_save_epoch")

Counts = Counter[str]


class Meter:
    """The counters of runtime.cpp, by step and since the first batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.places: Counter[str] = Counter()
        self.num_pictures = 0
        self.reports = True
        self._first: Counts | None = None
        self._begin: Counts | None = None
        self._pictures_of_step = 0
        self._aside: Counts = Counter()
        self._depth = 0
        self._watching = contextlib.ExitStack()

    def read(self) -> Counts:
        """All counters, by name."""
        library = ctypes.CDLL(None)
        library.pretend_names.restype = ctypes.c_char_p
        names = library.pretend_names().decode().split()
        values = (ctypes.c_longlong * len(names))()
        library.pretend_counts(values)
        return Counter(dict(zip(names, values, strict=True)))

    def first_batch(self) -> None:
        """From here on copies are those of batches, and no longer of weights."""
        if self._first is None:
            ctypes.CDLL(None).pretend_forget_largest()
            self._first = self.read()

    def step(self, num_pictures: int) -> None:
        """A step begins, and the one before is over."""
        self.first_batch()
        now = self.read()
        if self._begin is not None:
            done = now - self._begin - self._aside  # what is 0 is left out
            self.steps.append({**done, "pictures": self._pictures_of_step})
        number = len(self.steps) + 1
        if number == FIRST:
            self._watch_waits()
        elif number == LAST + 1:
            self._watching.close()
        self._begin, self._aside, self._pictures_of_step = self.read(), Counter(), num_pictures
        self.num_pictures += num_pictures

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within belongs to no step."""
        before = self.read()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._aside += self.read() - before

    def _watch_waits(self) -> None:
        """PyTorch warns of every operation that waits for the device; the warning says where it is."""
        import torch

        self._watching.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        others = warnings.showwarning

        def show(message: Any, *where: Any, **more: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                others(message, *where, **more)
            elif not self._depth:
                stack = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
                own = [line.split("cn_clip/", 1)[1] for line in stack if "cn_clip/" in line]
                self.places[" < ".join(reversed(own[-3:])) or stack[-1]] += 1

        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        self._watching.callback(torch.cuda.set_sync_debug_mode, "default")

    def report(self, path: str) -> None:
        """Adds a line to the file: what this process counted."""
        self._watching.close()
        torch = sys.modules.get("torch")
        total = self.read()
        record = {
            "rank": int(os.environ.get("RANK", "0")),
            "steps": self.steps,
            "waits_at": dict(self.places.most_common()),
            "pictures": self.num_pictures,
            "since_first_batch": None if self._first is None else total - self._first,
            "total": total,
            "largest_pageable": None if self._first is None else total["up_pageable_largest"],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0,
        }
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


METER = Meter()


def report_at_exit() -> None:
    """Has a process that is told by PRETEND_REPORT where to write do so once, however it leaves."""
    path, process, leave = os.environ.get("PRETEND_REPORT"), os.getpid(), os._exit
    if not path:
        return

    def report() -> None:
        if os.getpid() == process and METER.reports:
            METER.reports = False
            METER.report(path)

    def leave_at_once(status: int) -> NoReturn:
        report()
        leave(status)

    atexit.register(report)
    os._exit = leave_at_once


def watch_training(trainer: Any) -> None:
    """Has `Trainer` tell the meter of its steps, and of what it does between them."""
    wrapped = trainer.Trainer
    step = wrapped._step

    @functools.wraps(step)
    def counted(self: Any, number: int, batches: Any) -> Any:
        METER.step(sum(len(batch.ids) for batch in batches))
        return step(self, number, batches)

    wrapped._step = counted
    for name in ASIDE:
        setattr(wrapped, name, _aside(getattr(wrapped, name)))


def _aside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **settings: Any) -> Any:
        with METER.aside():
            return function(*args, **settings)

    return called


def watch_extraction(pytorch: Any) -> None:
    """Has `TorchBackend` tell the meter of its batches."""
    wrapped = pytorch.TorchBackend
    for name in ("start_pixels", "start_tokens"):  # every batch goes through them
        setattr(wrapped, name, _batch(getattr(wrapped, name), has_pictures=name == "start_pixels"))


def _batch(function: Callable[..., Any], *, has_pictures: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(self: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        METER.first_batch()
        METER.num_pictures += len(inputs) if has_pictures else 0
        return function(self, inputs, *args, **settings)

    return called
