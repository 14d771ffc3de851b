"""AdamW with the decay groups of Chinese-CLIP, its state in checkpoints, and its learning rate over the steps."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cn_clip.training.distributed import like, whole

# Biases, gains and the logit scale do not decay. "ln" does not match BERT's LayerNorm: its gains do decay, as they
# always have, and the order of the groups is part of the checkpoint format.
NO_DECAY = ("bn", "ln", "bias", "logit_scale")
MAX_LOGIT_SCALE = 4.6052


def decay_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters: first those without decay, then the rest, in `named_parameters` order."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    free = [parameter for name, parameter in trainable if any(part in name for part in NO_DECAY)]
    decayed = [parameter for name, parameter in trainable if not any(part in name for part in NO_DECAY)]
    return [free, decayed]


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`, which decay by 0 and `weight_decay`."""
    free, decayed = decay_groups(model)
    # Fused arithmetic takes whole tensors or split ones (FSDP), not both; the scalars are never split.
    is_split = any(hasattr(parameter, "placements") for parameter in model.parameters())
    scalars = [parameter for parameter in free if parameter.ndim == 0 and is_split]
    free = [parameter for parameter in free if not any(parameter is scalar for scalar in scalars)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    if scalars:
        groups.append({"params": scalars, "weight_decay": 0.0})
    device = next(model.parameters()).device
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=device.type in ("cpu", "cuda"))


def optimizer_state(optimizer: torch.optim.Optimizer, groups: list[list[nn.Parameter]]) -> dict[str, Any]:
    """What `optimizer.state_dict()` would be with the parameters in `groups` and whole tensors.

    With a model split over processes every process must ask.
    """
    numbers = itertools.count()
    state: dict[int, dict[str, Any]] = {}
    param_groups = []
    for group, parameters in zip(optimizer.param_groups, groups, strict=False):
        settings = {name: value for name, value in group.items() if name != "params"}
        indices = [next(numbers) for _ in parameters]
        param_groups.append({**settings, "params": indices})
        for index, parameter in zip(indices, parameters, strict=True):
            if parameter in optimizer.state:
                state[index] = {name: whole(value) for name, value in optimizer.state[parameter].items()}
    return {"state": state, "param_groups": param_groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, groups: list[list[nn.Parameter]], saved: dict[str, Any]
) -> None:
    """Takes what `optimizer_state` gave, in this arrangement of processes or another; settings but the rate stay.

    Raises ValueError or KeyError when the state is of other parameters, and others when it is no such state.
    """
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group) for group in groups]:
        raise ValueError(f"groups of {sizes} parameters, expected {[len(group) for group in groups]}")
    of_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for parameters, group in zip(groups, saved["param_groups"], strict=True):
        for parameter, index in zip(parameters, group["params"], strict=True):
            entry = of_parameter[parameter] = {}
            for name, saved_value in (saved["state"].get(index) or {}).items():
                # PyTorch before 1.12 kept the number of steps as an integer.
                value = saved_value if isinstance(saved_value, Tensor) else torch.tensor(float(saved_value))
                if value.shape not in (parameter.shape, torch.Size()):
                    raise ValueError(f"{name} of the shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
                entry[name] = like(value, parameter) if value.shape == parameter.shape else value
    own = optimizer.state_dict()
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {index: entry for index, parameter in enumerate(flat) if (entry := of_parameter[parameter])}
    for group in own["param_groups"]:
        group["lr"] = float(saved["param_groups"][0]["lr"])
    optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})


def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Keeps exp(logit_scale) in [1, 100], in place. Source: arXiv:2103.00020, section 2.5."""
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)


# --- the learning rate ------------------------------------------------------------------------------------------------


def cosine_lr(
    optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int
) -> Callable[[int], float]:
    """A function that gives every group of the optimizer the rate of a step counted from 0, and returns the rate."""

    def adjust(step: int) -> float:
        rate = learning_rate(step, base_lr=base_lr, warmup=warmup_length, total_steps=steps)
        assign_learning_rate(optimizer, rate)
        return rate

    return adjust


def learning_rate(step: int, *, base_lr: float, warmup: int, total_steps: int) -> float:
    """Rate of the step counted from 0: linear warm-up, then half a cosine down to 0 at `total_steps`."""
    if step < warmup:
        return _warmup_lr(base_lr, warmup, step)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) * base_lr


def _warmup_lr(base_lr: float, warmup_length: int, step: int) -> float:
    return base_lr * (step + 1) / warmup_length


def assign_learning_rate(optimizer: torch.optim.Optimizer, new_lr: float) -> None:
    """Gives every group of the optimizer the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = new_lr
