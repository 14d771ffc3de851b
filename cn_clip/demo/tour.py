"""The steps of the demo, each a command you can type, and what it prints at the end."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from cn_clip import command, zoo
from cn_clip.clip.encoder import Encoder
from cn_clip.data.grid import draw_grid
from cn_clip.demo import emoji
from cn_clip.eval import (
    evaluation,
    extract_features,
    make_topk_predictions,
    transform_ir_annotation_to_tr,
    zeroshot_evaluation,
)
from cn_clip.features.files import read_features
from cn_clip.preprocess import build_lmdb_dataset, check_dataset
from cn_clip.retrieval.flat import top_k
from cn_clip.training import main as training

MODEL = "Emoji-Tiny"
UNSEEN: emoji.Vendor = "twemoji"
QUERIES = ("下雨天", "想吃水果", "红苹果", "小猫", "生日蛋糕", "睡觉", "晚上的月亮", "坐飞机")
GRID_COLUMNS = 6
DIRECTIONS = {"text_to_image": "以文搜图 / text→image", "image_to_text": "以图搜文 / image→text"}
# Not indented, so that it can be pasted into a shell as it is printed.
EPILOGUE = """
自己试试，把下面几行粘贴到终端 / ask the model yourself, paste this into a shell:

{python} - <<'EOF'
from cn_clip.clip import Encoder
from cn_clip.demo import emoji
pictures = emoji.load("twemoji")
encoder = Encoder("Emoji-Tiny")
scores = encoder.encode_texts(["下雨天"]) @ encoder.encode_images([one.picture for one in pictures]).T
print([pictures[n].name for n in scores[0].argsort()[::-1][:5]])
EOF"""
PAGE = """
在浏览器里搜这些图片 / search these pictures in a browser, at http://127.0.0.1:8000:

{python} -m pip install 'cn-clip-next[page]'
{python} -m cn_clip index build {pictures} --output {index} --model Emoji-Tiny
{python} -m cn_clip serve {index}"""


class Tour:
    """The steps of the demo. Each prints the command it runs."""

    def __init__(self, folder: Path, *, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        self.data = folder / "datasets" / "emoji"
        self.classes = folder / "datasets" / "emoji-classes"
        self.logs = folder / "experiments"
        # A run of other settings is another one: it must not go on from the checkpoints of this one.
        self.name = f"emoji-tiny_seed{seed}_steps{steps}"
        self.checkpoint = self.logs / self.name / "checkpoints" / "epoch_latest.pt"
        self.grid = folder / "grid.png"
        self.index = folder / "emoji.index"
        self.number = 0

    def make_dataset(self) -> None:
        """Writes the embedded pictures in the dataset's text files, checks them, builds the LMDB."""
        self._headline("数据集：模型没见过的 Twemoji 图片", "dataset: Twemoji drawings, new to the model")
        emoji.write_dataset(self.data, seed=self.seed, vendor=UNSEEN)
        self._call("dataset check", check_dataset, "--data_dir", self.data, "--splits", "train,valid")
        self._call("dataset build", build_lmdb_dataset, "--data_dir", self.data, "--splits", "train,valid")

    def recalls(self, model: str | Path) -> dict[str, dict[str, float]]:
        """Recall of a model in both directions: each name looks for its picture, each picture for its name."""
        self.extract(model)
        return {"text_to_image": self.recall("text"), "image_to_text": self.recall("image")}

    def extract(self, model: str | Path) -> None:
        """Turns all pictures and names into vectors."""
        self._headline("特征：图片和文字变成向量", "features: pictures and text to vectors")
        self._call(
            "features",
            extract_features,
            *("--extract-image-feats", "--extract-text-feats", "--img-batch-size", 256, "--text-batch-size", 256),
            *("--image-data", self.data / "lmdb" / "valid" / "imgs", "--text-data", self.data / "valid_texts.jsonl"),
            *("--resume", model),
        )

    def recall(self, query: str) -> dict[str, float]:
        """Finds the ten nearest for every query and scores them."""
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

    def classify(self, model: str | Path) -> float:
        """Sorts pictures into classes it has only been told the names of."""
        self._headline("零样本分类：只给中文类别名", "zero-shot classification by Chinese labels")
        emoji.write_classification(self.classes, emoji.drawn_classes(UNSEEN), vendor=UNSEEN)
        words = self._announce(
            "zeroshot",
            *("--datapath", self.classes / "test", "--label-file", self.classes / "label_cn.txt"),
            *("--dataset", "emoji", "--save-dir", self.classes, "--num-workers", 1, "--resume", model),
        )
        options = command.parse(zeroshot_evaluation.Options, words)
        return zeroshot_evaluation.evaluate(options, command.Speaker(quiet=False)).top1

    def draw(self, model: str | Path) -> Path:
        """A picture of some queries, most of them no emoji's name, and what they found."""
        self._headline("图片表：查询与结果", "picture grid: queries and what they found")
        pictures = {picture.number: picture for picture in emoji.load(UNSEEN)}
        gallery = read_features(self.data / "valid_imgs.img_feat.jsonl", "image_id")
        shown = [pictures[int(number)] for number in gallery.ids]
        found = top_k(Encoder(model).encode_texts(QUERIES), gallery.vectors, GRID_COLUMNS).indices
        rows = [
            (query, [(shown[n].picture, shown[n].name, shown[n].name == query) for n in numbers])
            for query, numbers in zip(QUERIES, found.tolist(), strict=True)
        ]
        draw_grid(rows, self.grid)
        return self.grid

    def train(self) -> None:
        """Fine-tunes the bundled model on the new drawings, or goes on from where a demo was killed."""
        self._headline("微调：从随包模型接着学这些图片", "fine-tuning: the bundled model learns these drawings")
        entry, steps = zoo.BUNDLED[MODEL], self.steps
        self._call(
            "train",
            training,
            *("--train-data", self.data / "lmdb" / "train", "--init", MODEL),
            *("--vision-model", entry.vision, "--text-model", entry.text, "--logs", self.logs, "--name", self.name),
            *("--batch-size", 256, "--num-workers", 1, "--max-steps", steps),
            *("--lr", 5e-4, "--beta2", 0.98, "--wd", 0.1, "--warmup", max(1, steps // 10), "--multi-positive"),
            *("--save-epoch-frequency", -1, "--log-interval", 10),
            *("--seed", self.seed, "--report-training-batch-acc"),
        )

    def print_summary(self, summary: dict[str, Any]) -> None:
        """The results of all steps as a table, where they are, and what to try next."""
        print("\n================ 结果 / results ================")
        titles = {"before": "随包模型，没见过这些图片 / Emoji-Tiny, drawings unseen"}
        titles["after"] = f"微调 {summary['steps']} 步后，学过这些图片 / fine-tuned, drawings learned"
        for stage, title in titles.items():
            if summary[stage]:
                print(title)
                print(f"{'':26}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MR':>8}")
                for name, direction in DIRECTIONS.items():
                    scores = [summary[stage][name][key] for key in ("r1", "r5", "r10", "mean_recall")]
                    print(f"{direction:22}" + "".join(f"{score:8.1f}" for score in scores))
        print(f"零样本分类（随包模型）/ zero-shot top-1 of Emoji-Tiny: {summary['zeroshot'] * 100:.1f} %")
        print(f"图片表 / picture grid: {self.grid}")
        if summary["after"]:
            print(f"微调后的模型 / checkpoint: {self.checkpoint}")
        print(f"用时 / time: {summary['seconds']:.0f} s")
        python = shlex.quote(sys.executable)
        print(EPILOGUE.format(python=python))
        pictures, index = (shlex.quote(str(path)) for path in (self.data / "lmdb" / "valid", self.index))
        print(PAGE.format(python=python, pictures=pictures, index=index))

    def _headline(self, chinese: str, english: str) -> None:
        self.number += 1
        print(f"\n【{self.number}】{chinese} / {english}", flush=True)

    def _call(self, name: str, module: Any, *arguments: object) -> None:
        module.main(self._announce(name, *arguments))

    def _announce(self, name: str, *arguments: object) -> list[str]:
        words = [str(argument) for argument in arguments]
        print(f"$ cn-clip {name} {' '.join(words)}", flush=True)
        return words
