"""What the commands on weight files share: the weights in a type, and the names of the towers they belong to."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cn_clip import zoo
from cn_clip.clip.checkpoint import Checkpoint, infer_config
from cn_clip.clip.loading import build
from cn_clip.clip.model import convert_weights
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
            raise CheckpointError(f"{checkpoint.path}: {name} holds values too large for float16; use --precision fp32")
    return tensors


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def tower_names(config: zoo.ModelConfig) -> tuple[str | None, str | None]:
    """The names of the two architectures, None for one without a name; a tower may be at another resolution."""
    wanted = config.vision.image_resolution
    named = {name: zoo.vision_config(name) for name in zoo.VISION_MODELS}
    exact = [name for name, known in named.items() if known == config.vision]
    resized = [name for name, known in named.items() if replace(known, image_resolution=wanted) == config.vision]
    texts = [name for name in zoo.TEXT_MODELS if _text_shape(zoo.text_config(name)) == _text_shape(config.text)]
    return next(iter(exact + resized), None), next(iter(texts), None)


def _text_shape(config: zoo.TextConfig) -> zoo.TextConfig:
    """Without what leaves no trace in a file."""
    return replace(config, text_attention_probs_dropout_prob=0.0, text_hidden_dropout_prob=0.0, text_hidden_act="")


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
