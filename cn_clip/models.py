"""Lists the models to be had by name, their sizes, and which of them are on this machine.

cn-clip models [--json] [--download-root FOLDER]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip import columns, command
from cn_clip.jsonl import dumps
from cn_clip.zoo import (
    BUNDLED,
    DOWNLOAD_ROOT,
    HUGGINGFACE_ORG,
    PUBLISHED,
    Bundled,
    ModelConfig,
    Published,
    TextConfig,
    VisionConfig,
    model_config,
)


@dataclass(frozen=True)
class Options:
    """Lists the published and the bundled models and where their files are."""

    download_root: Path = DOWNLOAD_ROOT
    """Folder with downloaded checkpoints"""
    json: bool = False
    """Print the list as one JSON object"""


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Number of trainable values of the model: (all, of the picture tower); computed, nothing is built."""
    visual = _vit(config.vision) if config.vision.vision_patch_size else _resnet(config.vision)
    logit_scale = 1
    return visual + _bert(config.text, config.vision.embed_dim) + logit_scale, visual


def _transformer_layer(width: int, inner: int) -> int:
    """Four attention matrices and two of the perceptron with their biases, and two layer norms."""
    return 4 * (width * width + width) + (width * inner + inner) + (inner * width + width) + 2 * 2 * width


def _vit(vision: VisionConfig) -> int:
    assert isinstance(vision.vision_layers, int)
    assert vision.vision_patch_size
    width, patch = vision.vision_width, vision.vision_patch_size
    positions = (vision.image_resolution // patch) ** 2 + 1
    embeddings = 3 * patch * patch * width + width + positions * width
    layer_norms = 2 * 2 * width
    layers = vision.vision_layers * _transformer_layer(width, 4 * width)
    return embeddings + layer_norms + layers + width * vision.embed_dim


def _convolution(inputs: int, outputs: int, side: int) -> int:
    """A convolution without bias, and the scale and shift of its batch norm."""
    return inputs * outputs * side * side + 2 * outputs


def _bottleneck(inputs: int, width: int, *, shortcut: bool) -> int:
    outputs = 4 * width
    count = _convolution(inputs, width, 1) + _convolution(width, width, 3) + _convolution(width, outputs, 1)
    return count + (_convolution(inputs, outputs, 1) if shortcut else 0)


def _resnet(vision: VisionConfig) -> int:
    assert isinstance(vision.vision_layers, tuple)
    width = vision.vision_width
    half = width // 2
    count = _convolution(3, half, 3) + _convolution(half, half, 3) + _convolution(half, width, 3)
    inputs = width
    for stage, num_blocks in enumerate(vision.vision_layers):
        for block in range(num_blocks):
            count += _bottleneck(inputs, width << stage, shortcut=block == 0)
            inputs = 4 * (width << stage)
    positions = (vision.image_resolution // 32) ** 2 + 1
    attention_pool = positions * inputs + 3 * (inputs * inputs + inputs) + inputs * vision.embed_dim + vision.embed_dim
    return count + attention_pool


def _bert(text: TextConfig, embed_dim: int) -> int:
    width = text.text_hidden_size
    rows = text.vocab_size + text.text_max_position_embeddings + text.text_type_vocab_size
    layers = text.text_num_hidden_layers * _transformer_layer(width, text.text_intermediate_size)
    return rows * width + 2 * width + layers + width * embed_dim


def describe(name: str, entry: Published | Bundled, root: Path) -> dict[str, Any]:
    """What is known of one model; `path` is its file (a published one under `root`), None while it is not there.

    `repository` is None for a model that comes with this package.
    """
    total, visual = count_parameters(model_config(entry.vision, entry.text))
    file = entry.path if isinstance(entry, Bundled) else root.expanduser() / entry.filename
    return {
        "name": name,
        "vision_model": entry.vision,
        "text_model": entry.text,
        "resolution": entry.resolution,
        "num_params": total,
        "num_visual_params": visual,
        "repository": None if isinstance(entry, Bundled) else f"{HUGGINGFACE_ORG}/{entry.repo}",
        "file": entry.filename,
        "path": str(file) if file.is_file() else None,
        "bundled": isinstance(entry, Bundled),
    }


def _row(model: dict[str, Any]) -> list[str]:
    sizes = [f"{model['num_params']:,}", f"{model['num_visual_params']:,}"]
    repository = model["repository"] or "随包附带 / in this package"
    where = model["path"] or "未下载 / not here"
    return [model["name"], model["text_model"], str(model["resolution"]), *sizes, repository, where]


def run(options: Options) -> int:
    """Prints the table, or the JSON object."""
    entries: dict[str, Published | Bundled] = {**PUBLISHED, **BUNDLED}
    models = [describe(name, entry, options.download_root) for name, entry in entries.items()]
    if options.json:
        print(dumps({"download_root": str(options.download_root.expanduser()), "models": models}))
        return 0
    head = ["模型 / model", "文本塔 / text tower", "像素 / px", "参数 / parameters", "视觉 / visual"]
    rows = [[*head, "仓库 / repository", "文件 / file"], *map(_row, models)]
    print("\n".join(columns.align(rows, right=frozenset({2, 3, 4}))))
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
