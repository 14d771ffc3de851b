"""What ends a run before its last step: SIGTERM and Ctrl-C, and validations that get no better."""

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopWaiting(BaseException):
    """A signal came while the run waited for something that may never come."""


class StopRequest:
    """SIGTERM or Ctrl-C as a request that a run answers between two steps; `number`: the signal that asked, or None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_waiting = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes signals while the block runs; a second Ctrl-C ends the process at once.

        A second SIGTERM does not: schedulers and torchrun may both send one. Outside the main thread, where Python has
        no signals, it does nothing.
        """
        try:
            before = [signal.signal(name, self._note) for name in SIGNALS]
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for name, handler in zip(SIGNALS, before, strict=True):
                signal.signal(name, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A signal ends the block by StopWaiting; nothing in it may be lost by that."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if self._is_waiting:
            self._is_waiting = False
            raise StopWaiting


class EarlyStop:
    """The best score so far, and how many scores in a row were not better. Higher is better."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.bad = 0

    def observe(self, score: float) -> bool:
        """Whether `score` is the best one; equal is not better, and NaN never is."""
        is_best = not math.isnan(score) and (self.best is None or score > self.best)
        self.best, self.bad = (score, 0) if is_best else (self.best, self.bad + 1)
        return is_best

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` scores in a row were not better; None: never."""
        return patience is not None and self.bad >= patience

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self.best, self.bad = state["best"], state["bad"]
