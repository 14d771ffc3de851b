"""Writes weights without the rest of a training checkpoint, whole or not at all; for commands that make such files."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save
from torch import Tensor

from cn_clip import files
from cn_clip.clip.weights.checkpoint import Checkpoint
from cn_clip.clip.weights.file_formats import owned
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.files import atomic_write


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], source: Checkpoint, **more: Any) -> None:
    """A `.pt` as Chinese-CLIP reads it, with what `source` says of itself besides; `more` goes beside them.

    Raises CheckpointError when it cannot be written, DataError when the folder is missing.
    """
    counts: dict[str, Any] = {
        "epoch": source.epoch,
        "step": source.step,
        "name": str(source.extra.get("name", source.path.stem)),
    }
    if source.context_length is not None:
        counts["context_length"] = source.context_length
    if source.matryoshka:
        counts["matryoshka"] = list(source.matryoshka)
    state = {f"module.{name}": value for name, value in tensors.items()}
    _write(Path(path), lambda stream: torch.save({**counts, "state_dict": state, **more}, stream))


def write_state_dict(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Only the tensors, as `torch.load` gives them back; raises DataError when the folder is missing."""
    with atomic_write(path, "wb") as stream:
        torch.save(tensors, stream)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A `.safetensors` under the names of this package, the same bytes every time; raises as `write_checkpoint`."""

    def write(stream: IO[bytes]) -> None:
        # Tensor by tensor, as `save` would do it: that copies them all, and no thread runs meanwhile. One value each
        # says what it calls their types, and in which order they lie.
        values = owned(tensors)
        sample = save({name: value.new_zeros(1) for name, value in values.items()}, dict(metadata))
        head, begin = json.loads(sample[8 : 8 + int.from_bytes(sample[:8], "little")]), 0
        head["__metadata__"] = dict(sorted(metadata.items()))  # safetensors writes them in an order of chance
        names = sorted(values, key=lambda name: head[name]["data_offsets"])
        for name in names:
            end = begin + values[name].numel() * values[name].element_size()
            head[name] |= {"shape": list(values[name].shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(values[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    _write(Path(path), write)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        with atomic_write(path, "wb") as stream:
            write(stream)
    except (OSError, RuntimeError, KeyError) as error:  # KeyError: a type that safetensors does not know
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot be written ({reason})", at=path) from error


def refuse_inputs(output: str | Path, inputs: Iterable[str | Path], *, suffix: str | None = None) -> None:
    """Raises ConfigError when `output` is one of `inputs`, by whatever name, or does not end as it should."""
    if suffix is not None and Path(output).suffix != suffix:
        raise ConfigError(f"--output {output}: expected a name that ends in {suffix}")
    if suffix is None and Path(output).suffix == ".safetensors":
        raise ConfigError(f"--output {output}: this command writes .pt; for .safetensors use cn-clip checkpoint export")
    files.refuse_inputs("--output", output, inputs)


def check_same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """Raises CheckpointError naming the first tensor that only one of them has, or in another shape."""
    ours, theirs = first.state_dict, other.state_dict
    for name in [*ours, *theirs]:
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (ours, theirs)]
        if shapes[0] != shapes[1]:
            found = " and ".join("missing" if shape is None else str(shape) for shape in shapes)
            raise CheckpointError(f"{first.path} and {other.path} are of different models: {name} is {found}")


def check_finite(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError naming the first tensor that holds NaN or infinity."""
    for name, tensor in checkpoint.state_dict.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity; use an earlier checkpoint", at=checkpoint.path)
