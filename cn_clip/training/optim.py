"""AdamW with the decay groups of Chinese-CLIP, and its learning rate schedule."""

import math

import torch
from torch import nn

# Biases, gains and the logit scale do not decay. "ln" does not match BERT's LayerNorm: its gains do decay, as they
# always have, and the order of the groups is part of the checkpoint format.
NO_DECAY = ("bn", "ln", "bias", "logit_scale")
MAX_LOGIT_SCALE = 4.6052


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: first those without decay, then the rest, in `named_parameters` order."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    free = [parameter for name, parameter in trainable if any(part in name for part in NO_DECAY)]
    decayed = [parameter for name, parameter in trainable if not any(part in name for part in NO_DECAY)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    device = next(model.parameters()).device
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=device.type in ("cpu", "cuda"))


def learning_rate(step: int, *, base_lr: float, warmup: int, total_steps: int) -> float:
    """Rate of the step counted from 0: linear warm-up, then half a cosine down to 0 at `total_steps`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) * base_lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Keeps exp(logit_scale) in [1, 100], in place. Source: arXiv:2103.00020, section 2.5."""
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)
