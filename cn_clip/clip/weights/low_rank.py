"""Low-rank adapters (LoRA) as checkpoints hold them, and adding them to the weights they adapt; tensors only.

`STEM.weight` has `STEM.lora_A.weight` (r, in, ...) and `STEM.lora_B.weight` (out, r, ...) beside it. The joined
attention weight `….attn.in_proj_weight` has the stem `….attn.in_proj`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LowRank:
    """Size and strength of the adapters of a model: W + alpha / rank * B A. Source: arXiv:2106.09685."""

    rank: int
    alpha: float

    @classmethod
    def from_entry(cls, entry: object) -> "LowRank":
        """From the entry "lora" of a checkpoint; raises ValueError when it is not {"rank": r, "alpha": a}."""
        values: dict[Any, Any] = entry if isinstance(entry, dict) else {}
        rank, alpha = values.get("rank"), values.get("alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f'the entry "lora" is {entry!r}, expected {{"rank": r, "alpha": a}}')
        return cls(rank, float(alpha))

    def entry(self) -> dict[str, int | float]:
        """The entry "lora" of a checkpoint."""
        return {"rank": self.rank, "alpha": self.alpha}


def is_adapter(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an adapter."""
    return name.endswith((FIRST, SECOND))


def trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of a run with adapters those that it trains: the adapters, and the factor of the similarities."""
    return {name: value for name, value in tensors.items() if is_adapter(name) or name == "logit_scale"}


def merge(tensors: Mapping[str, Tensor], settings: LowRank) -> dict[str, Tensor]:
    """The tensors without adapters, which are added to their weights: in float32, in the type of the weight.

    Raises ValueError for an adapter that lacks its half or its weight, or has other shapes.
    """
    merged = {name: value for name, value in tensors.items() if not is_adapter(name)}
    stems = dict.fromkeys(name.removesuffix(FIRST).removesuffix(SECOND) for name in tensors if is_adapter(name))
    for stem in stems:
        target = next((name for name in (f"{stem}.weight", f"{stem}_weight") if name in merged), None)
        if target is None or stem + FIRST not in tensors or stem + SECOND not in tensors:
            raise ValueError(f"the adapter {stem} lacks its lora_A, its lora_B or the weight it adapts")
        weight, first, second, rank = merged[target], tensors[stem + FIRST], tensors[stem + SECOND], settings.rank
        # A convolution's second factor is 1 x 1, so that its product, too, is one of matrices.
        matrices = [value.float().reshape(len(value), -1) for value in (weight, first, second) if value.ndim > 1]
        shapes = [tuple(matrix.shape) for matrix in matrices]
        if len(shapes) < 3 or shapes[1:] != [(rank, shapes[0][1]), (shapes[0][0], rank)]:
            found = f"{tuple(first.shape)} and {tuple(second.shape)} for a weight of {tuple(weight.shape)}"
            raise ValueError(f"the adapter {stem} has shapes {found}, which do not fit at rank {rank}")
        adapted = matrices[0] + (settings.alpha / rank) * (matrices[2] @ matrices[1])
        merged[target] = adapted.view(weight.shape).to(weight.dtype)
    return merged
