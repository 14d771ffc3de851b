"""The whole job on the embedded emoji pictures, each step a command you can type: `cn-clip demo`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip import command
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError

VISION, TEXT = "RN-Tiny-64", "BERT-Tiny-chinese"
QUERIES = ("笑哭了", "冰淇淋", "猫", "红心", "自行车", "火箭", "彩虹", "生日蛋糕")
GRID_COLUMNS = 6


@dataclass(frozen=True)
class Options:
    """Emoji pictures and Chinese names become a dataset, a small model learns them, and the model is used."""

    output: str = "demo-output"
    """Folder for everything the demo writes"""
    steps: int = 400
    """Training steps of 256 pairs; 400 take about three minutes on two cores"""
    seed: int = 123
    """Seed of weights and data order"""
    json: bool = False
    """Print the result as one JSON object at the end"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps: expected at least 1, got {self.steps}")


def run(options: Options) -> None:
    """Runs every step; the results lie in `options.output`."""
    started = time.monotonic()
    tour = Tour(options, Path(options.output))
    with command.stdout_to_stderr(when=options.json):
        tour.make_dataset()
        tour.train()
        tour.extract()
        recalls = {"text_to_image": tour.recall("text"), "image_to_text": tour.recall("image")}
        accuracy = tour.classify()
        grid = tour.draw()
        summary = {**recalls, "zeroshot": accuracy, "grid": str(grid), "seconds": round(time.monotonic() - started, 1)}
        _print_summary(summary, tour)
    if options.json:
        print(json.dumps(summary, ensure_ascii=False))


class Tour:
    """The steps of the demo. Each prints the command it runs."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.data = folder / "datasets" / "emoji"
        self.classes = folder / "datasets" / "emoji-classes"
        self.logs = folder / "experiments"
        self.checkpoint = self.logs / "emoji" / "checkpoints" / "epoch_latest.pt"
        self.grid = folder / "grid.png"
        self.number = 0

    def make_dataset(self) -> None:
        """Writes the embedded pictures in the dataset's text files, checks them, builds the LMDB."""
        from cn_clip.preprocess import build_lmdb_dataset, check_dataset

        self._headline("数据集：图片和中文句子", "dataset: pictures and Chinese sentences")
        emoji.write_dataset(self.data, seed=self.options.seed)
        self._call("dataset check", check_dataset, "--data_dir", self.data, "--splits", "train,valid")
        self._call("dataset build", build_lmdb_dataset, "--data_dir", self.data, "--splits", "train,valid")

    def train(self) -> None:
        """Trains the small model from random weights, or goes on where a killed demo stood."""
        from cn_clip.training import main as training

        self._headline("训练：小模型从零学起", "training: a small model from scratch")
        steps = self.options.steps
        self._call(
            "train",
            training,
            *("--train-data", self.data / "lmdb" / "train", "--val-data", self.data / "lmdb" / "valid"),
            *("--vision-model", VISION, "--text-model", TEXT, "--logs", self.logs, "--name", "emoji"),
            *("--batch-size", 256, "--valid-batch-size", 256, "--num-workers", 1, "--max-steps", steps),
            *("--lr", 2e-3, "--beta2", 0.98, "--wd", 0.1, "--warmup", max(1, steps // 10)),
            *("--valid-step-interval", max(1, steps // 4), "--valid-epoch-interval", -1),
            *("--save-epoch-frequency", -1, "--log-interval", 10, "--seed", self.options.seed),
            "--report-training-batch-acc",
        )

    def extract(self) -> None:
        """Turns all pictures and names into vectors."""
        from cn_clip.eval import extract_features

        self._headline("特征：图片和文字变成向量", "features: pictures and text to vectors")
        self._call(
            "features",
            extract_features,
            *("--extract-image-feats", "--extract-text-feats", "--img-batch-size", 256, "--text-batch-size", 256),
            *("--image-data", self.data / "lmdb" / "valid" / "imgs", "--text-data", self.data / "valid_texts.jsonl"),
            *("--resume", self.checkpoint),
        )

    def recall(self, query: str) -> dict[str, float]:
        """Finds the ten nearest for every query and scores them."""
        from cn_clip.eval import evaluation, make_topk_predictions, transform_ir_annotation_to_tr

        by_text = query == "text"
        titles = ("以文搜图", "text finds pictures") if by_text else ("以图搜文", "pictures find text")
        self._headline(*titles)
        standard = self.data / ("valid_texts.jsonl" if by_text else "valid_texts.tr.jsonl")
        predictions = self.data / ("valid_predictions.jsonl" if by_text else "valid_tr_predictions.jsonl")
        result = self.data / ("valid_result.json" if by_text else "valid_tr_result.json")
        self._call(
            "topk",
            make_topk_predictions,
            *("--image-feats", self.data / "valid_imgs.img_feat.jsonl"),
            *("--text-feats", self.data / "valid_texts.txt_feat.jsonl"),
            *("--query", query, "--top-k", 10, "--output", predictions),
        )
        if not by_text:
            transform_ir_annotation_to_tr.main(["--input", str(self.data / "valid_texts.jsonl")])
        self._call("recall", evaluation, standard, predictions, result, "--query", query)
        scores: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["scoreJson"]
        return scores

    def classify(self) -> float:
        """Sorts pictures into classes it has only been told the names of."""
        from cn_clip.eval import zeroshot_evaluation

        self._headline("零样本分类：只给中文类别名", "zero-shot classification by Chinese labels")
        emoji.write_classification(self.classes)
        words = self._announce(
            "zeroshot",
            *("--datapath", self.classes / "test", "--label-file", self.classes / "label_cn.txt"),
            *("--dataset", "emoji", "--save-dir", self.classes, "--num-workers", 1, "--resume", self.checkpoint),
        )
        options = command.parse(zeroshot_evaluation.Options, words)
        return zeroshot_evaluation.evaluate(options, command.Speaker(quiet=False)).top1

    def draw(self) -> Path:
        """A picture of some queries and what they found."""
        from cn_clip.clip.encoder import Encoder
        from cn_clip.demo.grid import draw_grid
        from cn_clip.eval.feature_files import read_features
        from cn_clip.retrieval.flat import top_k

        self._headline("图片表：查询与结果", "picture grid: queries and what they found")
        pictures = {picture.number: picture for picture in emoji.load()}
        gallery = read_features(self.data / "valid_imgs.img_feat.jsonl", "image_id")
        shown = [pictures[int(number)] for number in gallery.ids]
        found = top_k(Encoder(self.checkpoint).encode_texts(QUERIES), gallery.vectors, GRID_COLUMNS).indices
        rows = [
            (query, [(shown[n].picture, shown[n].name, shown[n].name == query) for n in numbers])
            for query, numbers in zip(QUERIES, found.tolist(), strict=True)
        ]
        draw_grid(rows, self.grid)
        return self.grid

    def _headline(self, chinese: str, english: str) -> None:
        self.number += 1
        print(f"\n【{self.number}】{chinese} / {english}", flush=True)

    def _call(self, name: str, module: Any, *arguments: object) -> None:
        module.main(self._announce(name, *arguments))

    def _announce(self, name: str, *arguments: object) -> list[str]:
        words = [str(argument) for argument in arguments]
        print(f"$ cn-clip {name} {' '.join(words)}", flush=True)
        return words


def _print_summary(summary: dict[str, Any], tour: Tour) -> None:
    print("\n================ 结果 / results ================")
    print(f"{'':26}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MR':>8}")
    for name, title in (("text_to_image", "以文搜图 / text→image"), ("image_to_text", "以图搜文 / image→text")):
        scores = [summary[name][key] for key in ("r1", "r5", "r10", "mean_recall")]
        print(f"{title:22}" + "".join(f"{score:8.1f}" for score in scores))
    print(f"零样本分类 / zero-shot top-1: {summary['zeroshot'] * 100:.1f} %")
    print(f"图片表 / picture grid: {tour.grid}")
    print(f"模型 / checkpoint:     {tour.checkpoint}")
    print(f"用时 / time:           {summary['seconds']:.0f} s")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
