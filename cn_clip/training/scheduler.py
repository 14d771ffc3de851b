"""The learning rate under Chinese-CLIP's names; the schedule is in `optim`."""

from collections.abc import Callable

import torch

from cn_clip.training.optim import learning_rate, set_learning_rate


def assign_learning_rate(optimizer: torch.optim.Optimizer, new_lr: float) -> None:
    """Gives every group of the optimizer the same rate."""
    set_learning_rate(optimizer, new_lr)


def _warmup_lr(base_lr: float, warmup_length: int, step: int) -> float:
    return base_lr * (step + 1) / warmup_length


def cosine_lr(
    optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int
) -> Callable[[int], float]:
    """A function that gives every group of the optimizer the rate of a step counted from 0, and returns the rate."""

    def adjust(step: int) -> float:
        rate = learning_rate(step, base_lr=base_lr, warmup=warmup_length, total_steps=steps)
        assign_learning_rate(optimizer, rate)
        return rate

    return adjust
