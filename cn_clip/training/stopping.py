"""What ends a run before its last step besides signals: validations that get no better."""

import math
from collections.abc import Mapping
from typing import Any


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
