"""What a weight file holds: `cn-clip checkpoint info epoch3.pt`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cn_clip import command, terminal, zoo
from cn_clip.errors import CheckpointError
from cn_clip.option_types import Json

if TYPE_CHECKING:
    from cn_clip.clip.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Options:
    """Prints architecture, size, epoch and step of a weight file, and whether training can go on from it."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A checkpoint, safetensors file, OpenAI archive or transformers folder"""
    json: Json = False


def run(options: Options) -> None:
    """Prints the table or the JSON object; raises CheckpointError when the file cannot be read."""
    from cn_clip.clip.weights.checkpoint import read_checkpoint

    say = command.Speaker(quiet=options.json)
    found = describe(read_checkpoint(options.file, merge_lora=False, mapped=True))
    for line in terminal.align(_rows(found)):
        say(line)
    say.result(found)


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """All that `info` tells, ready for JSON; sizes in bytes, types with the number of tensors."""
    from cn_clip.checkpoints.weights import file_bytes, num_bytes, num_parameters, type_name
    from cn_clip.clip.weights.low_rank import is_adapter

    adapters = {name: value for name, value in checkpoint.state_dict.items() if is_adapter(name)}
    weights = {name: value for name, value in checkpoint.state_dict.items() if name not in adapters}
    types = Counter(type_name(value.dtype) for value in weights.values())
    name = checkpoint.extra.get("name")
    return {
        "file": str(checkpoint.path),
        **_architecture(checkpoint),
        "num_params": num_parameters(weights),
        "num_lora_params": num_parameters(adapters),
        "dtypes": dict(types.most_common()),
        "name": name if isinstance(name, str) else None,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "optimizer": checkpoint.optimizer is not None,
        "resume": "resume" in checkpoint.extra,
        "lora": checkpoint.lora.entry() if checkpoint.lora else None,
        "bytes": file_bytes(checkpoint.path),
        "weight_bytes": num_bytes(checkpoint.state_dict),
        "optimizer_bytes": num_bytes(checkpoint.optimizer),
    }


def _architecture(checkpoint: "Checkpoint") -> dict[str, Any]:
    from cn_clip.clip.weights.checkpoint import infer_config

    try:
        config = infer_config(checkpoint)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{checkpoint.path}: ")
        return {"vision_model": None, "text_model": None, "resolution": None, "config": None, "unknown": reason}
    vision, text = zoo.tower_names(config)
    resolution = config.vision.image_resolution
    return {"vision_model": vision, "text_model": text, "resolution": resolution, "config": config.info()}


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    share = found["optimizer_bytes"] / found["bytes"] if found["bytes"] else 0
    rows = [
        ("文件 / file", found["file"]),
        ("架构 / architecture", found.get("unknown") or _towers(found)),
        ("参数 / parameters", f"{found['num_params']:,}"),
        ("类型 / types", ", ".join(f"{name} ({count})" for name, count in found["dtypes"].items())),
        ("实验 / name", f"{found['name'] or '-'}, epoch {found['epoch']}, step {found['step']}"),
        ("优化器状态 / optimizer", f"{_yes(found['optimizer'])}, {_size(found['optimizer_bytes'])} ({share:.0%})"),
        ("可续训 / resume state", _yes(found["resume"])),
        ("大小 / size", f"{_size(found['bytes'])}, weights {_size(found['weight_bytes'])}"),
    ]
    if found["lora"]:
        settings = f"rank {found['lora']['rank']}, alpha {found['lora']['alpha']:g}"
        rows.append(("LoRA", f"{settings}, {found['num_lora_params']:,} parameters"))
    return rows


def _towers(found: dict[str, Any]) -> str:
    """`ViT-B-16 @ RoBERTa-wwm-ext-base-chinese, 224 px`; depth and width of a tower without a name."""
    config = found["config"]
    family = "ViT" if config["vision_patch_size"] else "ResNet"
    vision = f"{family} {config['vision_layers']} x {config['vision_width']}"
    text = f"BERT {config['text_num_hidden_layers']} x {config['text_hidden_size']}"
    return f"{found['vision_model'] or vision} @ {found['text_model'] or text}, {found['resolution']} px"


def _yes(value: bool) -> str:
    return "有 / yes" if value else "无 / no"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
