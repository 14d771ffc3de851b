"""What a weight file holds: `cn-clip checkpoint info epoch3.pt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cn_clip import command, terminal
from cn_clip.language import both
from cn_clip.option_types import Json


@dataclass(frozen=True)
class Options:
    """Prints architecture, size, epoch and step of a weight file, and whether training can go on from it."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A checkpoint, safetensors file, OpenAI archive or transformers folder"""
    json: Json = False


def run(options: Options) -> None:
    """Prints the table or the JSON object; raises CheckpointError when the file cannot be read."""
    from cn_clip.checkpoints import weights

    say = command.Speaker(quiet=options.json)
    found = weights.describe(options.file)
    for line in terminal.align(_rows(found)):
        say(line)
    say.result(found)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    towers = found.get("unknown")
    if towers is None:  # `ViT-B-16 @ RoBERTa-wwm-ext-base-chinese, 224 px`; depth and width of a tower without a name
        config = found["config"]
        family = "ViT" if config["vision_patch_size"] else "ResNet"
        vision = found["vision_model"] or f"{family} {config['vision_layers']} x {config['vision_width']}"
        text = found["text_model"] or f"BERT {config['text_num_hidden_layers']} x {config['text_hidden_size']}"
        towers = f"{vision} @ {text}, {found['resolution']} px"
    share = found["optimizer_bytes"] / found["bytes"] if found["bytes"] else 0
    whole, weights = _size(found["bytes"]), _size(found["weight_bytes"])
    rows = [
        (both("文件", "file"), found["file"]),
        (both("架构", "architecture"), towers),
        (both("参数量", "parameters"), f"{found['num_params']:,}"),
        (both("类型", "types"), ", ".join(f"{name} ({count})" for name, count in found["dtypes"].items())),
        (both("实验名", "run"), f"{found['name'] or '-'}, epoch {found['epoch']}, step {found['step']}"),
        (
            both("优化器状态", "optimizer state"),
            f"{_yes(found['optimizer'])}, {_size(found['optimizer_bytes'])} ({share:.0%})",
        ),
        (both("续训状态", "resume state"), _yes(found["resume"])),
        (both("大小", "size"), both(f"{whole}，其中权重 {weights}", f"{whole}, weights {weights}")),
    ]
    if found["lora"]:
        settings = f"rank {found['lora']['rank']}, alpha {found['lora']['alpha']:g}"
        rows.append(("LoRA", f"{settings}, {found['num_lora_params']:,} parameters"))
    if found["base"]:
        base = f"{terminal.shown(found['base']['name'])} ({found['base']['fingerprint']})"
        rows.append((both("基座", "base"), both(f"{base} 的适配器", f"adapters of {base}")))
    return rows


def _yes(value: bool) -> str:
    return both("有", "yes") if value else both("无", "no")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
