"""What the validations of a run say: whether it gets no better and ends early, and what it came to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How the validations of a run went: scores at its start, its best step and its end; higher is better.

    start: at step 0; None for a run that was not validated there, such as one that goes on from Chinese-CLIP's.
    """

    start: float | None
    best: float
    best_step: int
    last: float
    last_step: int

    @property
    def is_better(self) -> bool:
        """Whether the best score came after the start."""
        return self.start is None or self.best_step > 0


class EarlyStop:
    """The best score so far, and how many scores in a row were not better. Higher is better."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.bad = 0
        self.start: float | None = None
        self.best_step = self.last_step = 0
        self.last = math.nan

    def observe(self, score: float, step: int = 0) -> bool:
        """Whether `score` is the best one; equal is not better, and NaN never is."""
        is_best = not math.isnan(score) and (self.best is None or score > self.best)
        self.best, self.bad = (score, 0) if is_best else (self.best, self.bad + 1)
        self.best_step = step if is_best else self.best_step
        self.last, self.last_step = score, step
        if step == 0:
            self.start = score
        return is_best

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` scores in a row were not better; None: never."""
        return patience is not None and self.bad >= patience

    @property
    def outcome(self) -> Outcome | None:
        """What all scores came to; None without one after the start."""
        if self.best is None or not self.last_step:
            return None
        return Outcome(self.start, self.best, self.best_step, self.last, self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        names = ("best", "bad", "start", "best_step", "last", "last_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; those of earlier versions have only `best` and `bad`."""
        self.best, self.bad = state["best"], state["bad"]
        self.start, self.last = state.get("start"), state.get("last", math.nan)
        self.best_step, self.last_step = state.get("best_step", 0), state.get("last_step", 0)
