"""What the commands on weight files share: the weights in a type, and their sizes."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cn_clip.clip.loading import build
from cn_clip.clip.model import convert_weights
from cn_clip.clip.weights.checkpoint import Checkpoint, infer_config
from cn_clip.errors import CheckpointError

Precision = Literal["keep", "fp16", "fp32"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def in_precision(checkpoint: Checkpoint, precision: Precision) -> dict[str, Tensor]:
    """The weights as they are, all in float32, or in float16 where Chinese-CLIP's published files are.

    Raises CheckpointError when a weight is too large for float16, or the file is of no known architecture.
    """
    if precision == "keep":
        return checkpoint.state_dict
    if precision == "fp32":
        return {name: _float(value) for name, value in checkpoint.state_dict.items()}
    model = build(infer_config(checkpoint), checkpoint)
    convert_weights(model)
    tensors = model.state_dict()
    for name, value in tensors.items():
        if not value.isfinite().all() and checkpoint.state_dict[name].isfinite().all():
            raise CheckpointError(
                f"{name} holds values too large for float16; use --precision fp32", at=checkpoint.path
            )
    return tensors


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def num_parameters(tensors: dict[str, Tensor]) -> int:
    """Values that training can change: all but the statistics of batch normalisation."""
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(BUFFERS))


def num_bytes(content: object) -> int:
    """Bytes of all tensors in a nested structure of any depth; what stands in it several times counts once."""
    total, seen, waiting = 0, set(), [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:  # a file from elsewhere may hold a list that holds itself
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict | list | tuple):
            waiting += item.values() if isinstance(item, dict) else item
    return total


def file_bytes(path: str | Path) -> int:
    """Size of a weight file, or of all files in a folder."""
    path = Path(path)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def type_name(dtype: torch.dtype) -> str:
    """`float16` of `torch.float16`."""
    return str(dtype).removeprefix("torch.")
