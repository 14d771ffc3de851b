"""Lists the models to be had by name, their sizes, published results, and which of them are on this machine.

cn-clip models [--results] [--json] [--download-root FOLDER]
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip import command, terminal
from cn_clip.evaluation.benchmark_sets import classification_sets
from cn_clip.jsonl import dumps
from cn_clip.language import both
from cn_clip.zoo import (
    BUNDLED_DIR,
    DOWNLOAD_ROOT,
    Bundled,
    ModelConfig,
    Published,
    VisionConfig,
    everything,
    model_config,
)
from cn_clip.zoo_results import OTHERS, README, SPLITS, Result, Setup, results_of

# Columns of one table, so that it fits a terminal.
DATASETS_ABREAST = 5


@dataclass(frozen=True)
class Options:
    """Lists the published and the bundled models, and which files are here."""

    download_root: Path = DOWNLOAD_ROOT
    """Folder with downloaded checkpoints"""
    results: bool = False
    """List the published recall of the models instead"""
    json: bool = False
    """Print the list as one JSON object, with the results if asked for"""


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Number of trainable values of the model: (all, of the picture tower); computed, nothing is built."""
    vision = config.vision
    if vision.vision_patch_size:
        assert isinstance(vision.vision_layers, int)
        width, patch = vision.vision_width, vision.vision_patch_size
        positions = (vision.image_resolution // patch) ** 2 + 1
        embeddings = 3 * patch * patch * width + width + positions * width
        layer_norms = 2 * 2 * width
        layers = vision.vision_layers * _transformer_layer(width, 4 * width)
        visual = embeddings + layer_norms + layers + width * vision.embed_dim
    else:
        visual = _resnet(vision)
    text, width, logit_scale = config.text, config.text.text_hidden_size, 1
    rows = text.vocab_size + text.text_max_position_embeddings + text.text_type_vocab_size
    layers = text.text_num_hidden_layers * _transformer_layer(width, text.text_intermediate_size)
    bert = rows * width + 2 * width + layers + width * config.vision.embed_dim
    return visual + bert + logit_scale, visual


def _transformer_layer(width: int, inner: int) -> int:
    """Four attention matrices and two of the perceptron with their biases, and two layer norms."""
    return 4 * (width * width + width) + (width * inner + inner) + (inner * width + width) + 2 * 2 * width


def _convolution(inputs: int, outputs: int, side: int) -> int:
    """A convolution without bias, and the scale and shift of its batch norm."""
    return inputs * outputs * side * side + 2 * outputs


def _resnet(vision: VisionConfig) -> int:
    assert isinstance(vision.vision_layers, tuple)
    inputs, half = vision.vision_width, vision.vision_width // 2
    count = _convolution(3, half, 3) + _convolution(half, half, 3) + _convolution(half, inputs, 3)
    for stage, num_blocks in enumerate(vision.vision_layers):
        width, outputs = vision.vision_width << stage, 4 * vision.vision_width << stage
        for block in range(num_blocks):
            count += _convolution(inputs, width, 1) + _convolution(width, width, 3) + _convolution(width, outputs, 1)
            if block == 0:  # the shortcut
                count += _convolution(inputs, outputs, 1)
            inputs = outputs
    positions = (vision.image_resolution // 32) ** 2 + 1
    attention_pool = positions * inputs + 3 * (inputs * inputs + inputs) + inputs * vision.embed_dim + vision.embed_dim
    return count + attention_pool


def describe(name: str, entry: Published | Bundled, root: Path) -> dict[str, Any]:
    """What is known of one model; `path` is its file (a published one under `root`), None while it is not there.

    `repository` (on Hugging Face) is None for a model that comes with this package, `modelscope` also where ModelScope
    is not known to have it, `num_bytes` and `sha256` of the file where they are unknown.
    """
    total, visual = count_parameters(model_config(entry.vision, entry.text))
    published = entry if isinstance(entry, Published) else None
    file = entry.path if isinstance(entry, Bundled) else root.expanduser() / entry.filename
    return {
        "name": name,
        "vision_model": entry.vision,
        "text_model": entry.text,
        "resolution": entry.resolution,
        "num_params": total,
        "num_visual_params": visual,
        "repository": published and published.huggingface,
        "modelscope": published and published.modelscope,
        "file": entry.filename,
        "num_bytes": published.num_bytes if published else file.stat().st_size,
        "sha256": published and published.sha256,
        "path": str(file) if os.path.isfile(file) else None,
        "bundled": published is None,
    }


def table_of_models(models: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of at most 100 terminal cells, the first of them the head."""
    heads = {
        "模型": "model",
        "像素": "px",
        "参数": "params",
        "图片塔": "image",
        "大小": "size",
        "文件": "file",
        "本机": "here",
    }
    rows = []
    for model in models:
        counts = (f"{model[key] / 1e6:.1f}M" for key in ("num_params", "num_visual_params"))
        size = "?" if model["num_bytes"] is None else f"{model['num_bytes'] / 1e6:,.0f} MB"
        state = ("随包", "bundled") if model["bundled"] else ("已下载", "yes") if model["path"] else ("未下载", "no")
        here = both(*state)
        rows.append([model["name"], str(model["resolution"]), *counts, size, model["file"], here])
    return terminal.align([[both(*head) for head in heads.items()], *rows], right=frozenset({1, 2, 3, 4}))


def tables_of_results(names: Sequence[str]) -> list[str]:
    """Lines of one table for each dataset and direction, of the models that have results there, one for the accuracy of
    zero-shot classification, and their sources.

    A table has one line a model, and one block for each setup that any of them has results in.
    """
    titles: dict[Setup, str] = {
        "zero-shot": both("零样本", "zero-shot"),
        "fine-tuned": both("微调", "fine-tuned"),
    }
    directions = {"text": both("以文搜图", "text → image"), "image": both("以图搜文", "image → text")}
    everywhere = [(name, result) for name in names for result in results_of(name)]
    lines: list[str] = []
    for dataset, split in SPLITS.items():
        for query, direction in directions.items():
            here = [(name, one) for name, one in everywhere if (one.dataset, one.query) == (dataset, query)]
            models = list(dict.fromkeys(name for name, _ in here))
            blocks = []
            for setup, title in titles.items():
                found = {name: one for name, one in here if one.setup == setup}
                if found:
                    blocks.append([title, *_block([found.get(name) for name in models])])
            table = terminal.align(zip(["", "", *models], *blocks, strict=True))
            lines += [f"{dataset} ({split}){both('：', ': ')}{direction}", *table, ""]
    lines += _tables_of_accuracies(names)
    sources = dict.fromkeys([*(result.source for _, result in everywhere), README])
    units = both("单位：%；MR：三者的平均；来源：", "in %; MR: the mean of the three; from:")
    return [*lines, units, *(f"  {source}" for source in sources)]


def accuracies_of(name: str) -> dict[str, float]:
    """The published accuracy of zero-shot classification of a model in percent, by dataset."""
    known = {one.title: dict(one.others) | dict(one.published) for one in classification_sets().values()}
    return {title: of_model[name] for title, of_model in known.items() if name in of_model}


def _tables_of_accuracies(names: Sequence[str]) -> list[str]:
    titles = [one.title for one in classification_sets().values() if one.published]
    found = {name: accuracies_of(name) for name in names}
    lines = []
    for start in range(0, len(titles), DATASETS_ABREAST):
        some = titles[start : start + DATASETS_ABREAST]
        rows = [
            [name, *("–" if title not in of_model else f"{of_model[title]:.1f}" for title in some)]
            for name, of_model in found.items()
            if any(title in of_model for title in some)
        ]
        head = f"ELEVATER (test){both('：零样本分类', ': zero-shot classification')}"
        lines += [head, *terminal.align([["", *some], *rows], right=frozenset(range(1, len(some) + 1))), ""]
    return lines


def _block(results: Sequence[Result | None]) -> list[str]:
    """The head and the numbers; the mean only where one is published."""
    columns_of = {"R@1": "recall_1", "R@5": "recall_5", "R@10": "recall_10", "MR": "mean"}
    shown = [head for head, field in columns_of.items() if any(one and getattr(one, field) for one in results)]
    values = [[getattr(one, columns_of[head], None) for head in shown] for one in results]
    rows = [["–" if value is None else f"{value:.1f}" for value in row] for row in values]
    return terminal.align([shown, *rows], right=frozenset(range(len(shown))))


def _results(name: str) -> dict[str, Any]:
    return {"results": [result._asdict() for result in results_of(name)], "accuracies": accuracies_of(name)}


def _all_others() -> list[str]:
    """The models that are not to be had here, of which results are published."""
    classified = (name for one in classification_sets().values() for name in one.others)
    return list(dict.fromkeys([*OTHERS, *classified]))


def run(options: Options) -> None:
    """Prints the tables, or the JSON object."""
    root = options.download_root.expanduser()
    models = [describe(name, entry, root) for name, entry in everything().items()]
    if options.json:
        for model in models if options.results else ():
            model |= _results(model["name"])
        others = {"others": [{"name": name, **_results(name)} for name in _all_others()]} if options.results else {}
        print(dumps({"download_root": str(root), "models": models, **others}))
    elif options.results:
        print("\n".join(tables_of_results([*(model["name"] for model in models), *_all_others()])))
        print(f"Emoji-Tiny: {BUNDLED_DIR / 'MODEL_CARD.md'}")
    else:
        print("\n".join(table_of_models(models)))
        print(both(f"文件夹：{root}", f"folder: {root}"))
        print(
            both(
                "下载：cn-clip download NAME；成绩：cn-clip models --results",
                "to download: cn-clip download NAME; results: cn-clip models --results",
            )
        )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
