"""What the commands on weight files do: describe, average and convert them; `clip.weights.forms` writes the forms."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip import files, zoo
from cn_clip.clip.backends import onnx_folders
from cn_clip.clip.backends.exported import Source, announce
from cn_clip.clip.weights import hf
from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, Checkpoint, infer_config, read_checkpoint
from cn_clip.clip.weights.form_names import ONNX_FOLDERS
from cn_clip.clip.weights.forms import Precision, in_precision, metadata, whole, write_file, write_folder
from cn_clip.clip.weights.low_rank import is_adapter, trained
from cn_clip.clip.weights.writing import check_same_tensors, refuse_inputs, write_checkpoint, write_safetensors
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.language import both
from cn_clip.progress import counted
from cn_clip.zoo import ModelConfig

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# --- the work of the commands; each raises CheckpointError for a file that cannot be read


def strip(file: str, output: str, precision: Precision) -> int:
    """Writes only the weights of a checkpoint, as a .pt; returns how many tensors."""
    refuse_inputs(output, [file])
    checkpoint = read_checkpoint(file, mapped=True)
    _refuse_bases("--output", output, [checkpoint])
    tensors = in_precision(checkpoint, precision)
    # Chinese-CLIP refuses a tensor it does not know; similarity does not need this one.
    kept = {name: value for name, value in tensors.items() if name != SIGMOID_BIAS}
    write_checkpoint(output, kept, checkpoint)
    return len(kept)


def export(file: str, output: str, precision: Precision) -> tuple[int, dict[str, str]]:
    """Writes the weights of a checkpoint as safetensors; returns how many tensors, and the metadata."""
    refuse_inputs(output, [file], suffix=".safetensors")
    checkpoint = read_checkpoint(file, mapped=True)
    _refuse_bases("--output", output, [checkpoint])
    tensors = in_precision(checkpoint, precision)
    about = metadata(checkpoint)
    write_safetensors(output, tensors, about)
    return len(tensors), about


def average(inputs: Sequence[str], output: str) -> int:
    """Writes the mean of several checkpoints, as `mean` has it; returns how many tensors."""
    refuse_inputs(output, inputs)
    # Mapped: of each file only the tensor in use is in memory. Adapters are merged: the mean of products is not the
    # product of means.
    checkpoints = [read_checkpoint(file, mapped=True) for file in inputs]
    _refuse_bases("--output", output, checkpoints)
    tensors = mean(checkpoints)
    write_checkpoint(output, tensors, checkpoints[-1])
    return len(tensors)


def convert(source: Path, target: Path, kind: str, precision: Precision) -> int:
    """Writes the model of `source` in another form; returns how many tensors.

    kind: one of `form_names.Kind`. Raises ConfigError when writing `target` would replace `source`, a folder that holds
    it, or a file of it.
    """
    files.refuse_inputs("TARGET", target, [source, source.with_name(hf.CONFIG_FILE)])
    if os.path.isdir(source) and source.resolve() in target.resolve().parents:
        raise ConfigError(f"TARGET {target}: is inside {source}, which is read; give another path")
    if target.resolve() in source.resolve().parents:
        raise ConfigError(f"TARGET {target}: holds {source}, which is read; give another path")
    checkpoint = read_checkpoint(source, mapped=True)
    _refuse_bases("TARGET", target, [checkpoint])
    if kind in ONNX_FOLDERS:
        return _write_onnx(source, target, kind, precision, infer_config(checkpoint))
    model = whole(checkpoint, precision)
    if kind in ("pt", "safetensors"):
        write_file(target, kind, model)
    else:
        write_folder(target, kind, model)
    return len(model.state_dict)


def _write_onnx(source: Path, target: Path, kind: str, precision: Precision, config: ModelConfig) -> int:
    with files.staged_folder(target) as folder:
        if kind == "immich":
            form = "fp16" if precision == "fp16" else "fp32"
            return onnx_folders.write_immich(folder, Source(source), config, form, say=announce)
        forms = ("fp32", "int8") if precision == "keep" else (precision,)
        return onnx_folders.write_transformers_js(folder, Source(source), config, forms, say=announce)


def _refuse_bases(flag: str, output: str | Path, read: Sequence[Checkpoint]) -> None:
    """Raises ConfigError when writing `output` would replace the base of adapters."""
    files.refuse_inputs(flag, output, [checkpoint.base_path for checkpoint in read])


# --- in memory


def describe(file: str) -> dict[str, Any]:
    """All that `info` prints, ready for JSON; sizes in bytes, types with the number of tensors.

    Raises CheckpointError when the file cannot be read.
    """
    checkpoint = read_checkpoint(file, merge_lora=False, mapped=True)
    adapters = {name: value for name, value in checkpoint.state_dict.items() if is_adapter(name)}
    weights = {name: value for name, value in checkpoint.state_dict.items() if name not in adapters}
    types = Counter(type_name(value.dtype) for value in weights.values())
    held = checkpoint.state_dict if checkpoint.base is None else trained(checkpoint.state_dict)
    name = checkpoint.extra.get("name")
    try:
        config = infer_config(checkpoint)
        vision, text = zoo.tower_names(config)
        known = {"resolution": config.vision.image_resolution, "config": config.info()}
        architecture: dict[str, Any] = {"vision_model": vision, "text_model": text, **known}
    except CheckpointError as error:
        architecture = dict.fromkeys(("vision_model", "text_model", "resolution", "config"))
        architecture["unknown"] = str(error).removeprefix(f"{checkpoint.path}: ")
    return {
        "file": str(checkpoint.path),
        **architecture,
        "num_params": num_parameters(weights),
        "num_lora_params": num_parameters(adapters),
        "dtypes": dict(types.most_common()),
        "name": name if isinstance(name, str) else None,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "optimizer": checkpoint.optimizer is not None,
        "resume": "resume" in checkpoint.extra,
        "lora": checkpoint.lora.entry() if checkpoint.lora else None,
        "base": checkpoint.base.entry() if checkpoint.base else None,
        "bytes": file_bytes(checkpoint.path),
        "weight_bytes": num_bytes(held),
        "optimizer_bytes": num_bytes(checkpoint.optimizer),
    }


def mean(checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The mean of each tensor, summed in float64, in the widest of its types; tensors of whole numbers from the last.

    Raises CheckpointError naming the first tensor that is missing in one file or has another shape there.
    """
    first, *others = checkpoints
    last = others[-1].state_dict
    sums = {name: value.double() for name, value in first.state_dict.items() if value.is_floating_point()}
    types = {name: first.state_dict[name].dtype for name in sums}
    for other in counted(others, both("个文件", "files"), both("平均", "averaging")):
        check_same_tensors(first, other)
        for name, total in sums.items():
            total += other.state_dict[name]
            types[name] = torch.promote_types(types[name], other.state_dict[name].dtype)
    means = {name: (total / (1 + len(others))).to(types[name]) for name, total in sums.items()}
    return {name: means.get(name, last[name]) for name in last}


def num_parameters(tensors: dict[str, Tensor]) -> int:
    """Values that training can change: all but the statistics of batch normalisation."""
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(BUFFERS))


def num_bytes(content: object) -> int:
    """Bytes of all tensors in a nested structure of any depth; what is in it several times counts once."""
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
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def type_name(dtype: torch.dtype) -> str:
    """`float16` of `torch.float16`."""
    return str(dtype).removeprefix("torch.")
