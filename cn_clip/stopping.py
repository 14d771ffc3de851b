"""SIGTERM and Ctrl-C as requests that a run answers when nothing is lost by it; training and indexing use it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

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

    def until(self, steps: Iterator[T]) -> Iterator[T]:
        """Each of `steps` until a signal comes; one that is waited for then is not given."""
        while self.number is None:
            try:
                with self.waiting():
                    one = next(steps)
            except (StopIteration, StopWaiting):
                return
            yield one

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if self._is_waiting:
            self._is_waiting = False
            raise StopWaiting
