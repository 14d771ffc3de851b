"""The steps of the demo: each runs a command you can type, whose output goes to `demo.log`; people get a line each."""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from cn_clip import command, processes, ranks, zoo
from cn_clip.data.grid import Row, draw_grid
from cn_clip.demo import emoji, next_steps, page
from cn_clip.demo.page import Facts, Found
from cn_clip.errors import CnClipError
from cn_clip.eval import (
    evaluation,
    extract_features,
    make_topk_predictions,
    transform_ir_annotation_to_tr,
    zeroshot_evaluation,
)
from cn_clip.features.files import read_features
from cn_clip.files import atomic_write
from cn_clip.language import both
from cn_clip.preprocess import build_lmdb_dataset, check_dataset
from cn_clip.progress import Step, progress
from cn_clip.report.findings import rank_all
from cn_clip.retrieval.flat import top_k
from cn_clip.training import main as training

MODEL = "Emoji-Tiny"
UNSEEN: emoji.Vendor = "twemoji"
# Of the pictures; never trained on. R@1 on them, text to image / image to text, with seeds 123, 1 and 2: before
# 74.2 / 70.8, 73.6 / 71.1, 70.8 / 71.1; after 60 steps 75.8 / 75.2, 73.3 / 75.5, 75.8 / 73.0. At a rate of 3e-4
# seed 123 falls to 72.0 / 71.7, and at 1e-4 the mean gain is 2.4 instead of 2.9.
HELD_OUT = 0.2
BATCH, RATE = 128, 2e-4
# Queries of the grid, whose rank improved and fell most, and pictures beside each. Of ranks 1 / rank counts: from 2 to
# 1 is more than from 90 to 30, where nothing of it is seen.
MOST_BETTER, MOST_WORSE, GRID_COLUMNS = 3, 1, 6
LOG = "demo.log"
Scores = dict[str, dict[str, float]]


def idle_cores() -> int | None:
    """Threads to compute with: the cores that nothing else uses; None, PyTorch's own choice, if that is not known.

    On two cores with a load of 7, two threads that wait for each other took 10 to 25 s a step, one takes 2 s.
    """
    try:
        load, cores = os.getloadavg()[0], processes.usable_cores()
    except (AttributeError, OSError):  # Windows has no load
        return None
    return max(1, min(cores, round(cores - load)))


class Tour:
    """One run of the demo, into `folder`; a context manager, which holds the log.

    A run that was killed is done again; its training goes on from its checkpoint, if it has written one.
    """

    def __init__(self, folder: Path, *, seed: int, steps: int, say: command.Speaker) -> None:
        self.folder, self.seed, self.steps, self.say = folder, seed, steps, say
        self.data = folder / "datasets" / "emoji"
        self.classes = folder / "datasets" / "emoji-classes"
        self.results = folder / "results"
        # A run of other settings is another one: it must not go on from the checkpoints of this one.
        self.run_folder = folder / "experiments" / f"emoji_seed{seed}_steps{steps}"
        self.checkpoint = self.run_folder / "checkpoints" / "epoch_latest.pt"
        self.grid, self.page = folder / "grid.png", folder / "index.html"
        self.commands: list[str] = []
        self.number, self.num_steps = 0, 6 if steps else 4
        self.log: TextIO | None = None
        self.bar = Step("")

    def __enter__(self) -> "Tour":
        ranks.use_threads(idle_cores())
        self.results.mkdir(parents=True, exist_ok=True)
        self.log = (self.folder / LOG).open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.log is not None
        self.log.close()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self.say.note(
                both("已停止；再运行同一条命令，会接着做完。", "Stopped; the same command again goes on from here.")
            )
        elif isinstance(error, CnClipError):
            log = self.folder / LOG
            self.say.note(both(f"这一步的详细日志在 {log}", f"the log of this step: {log}"))

    def take(self) -> dict[str, Any]:
        """All steps; returns what `--json` prints."""
        # Counted, so that the bars of the commands go away when they are done.
        with progress(self.num_steps, both("步", "steps"), both("演示", "demo")) as self.bar:
            summary, facts = self._take()
        self.tell_end(facts)
        return summary

    def _take(self) -> tuple[dict[str, Any], Facts]:
        started = time.monotonic()
        facts = Facts(self.steps, *self.make_dataset())
        self._step("考一次", "test")
        facts.before = self.measure("before", MODEL)
        self.tell_scores(facts.before, facts.num_held_out)
        facts.zeroshot = self.classify(MODEL)
        if self.steps:
            self.train(facts.num_held_out)
            self._step("再考一次，还是没学过的那些", "test again, on the same held-out drawings")
            facts.after = self.measure("after", self.checkpoint)
            self.tell_scores(facts.after, facts.num_held_out)
        self._step("图片表和网页", "picture grid and page")
        self.compare(facts)
        self.draw(facts)
        facts.seconds = time.monotonic() - started
        self.write_page(facts)
        summary = {
            **{"before": facts.before, "after": facts.after, "zeroshot": facts.zeroshot, "grid": str(self.grid)},
            **{"page": str(self.page), "learned": facts.num_learned, "held_out": facts.num_held_out},
            **{"steps": self.steps, "seconds": round(facts.seconds, 1)},
        }
        self.bar.advance()
        return summary, facts

    # --- the steps

    def make_dataset(self) -> tuple[int, int]:
        """Writes the embedded pictures as a dataset, checks it, builds the LMDB; returns the sizes of its splits."""
        kept = emoji.held_out(seed=self.seed, share=HELD_OUT, vendor=UNSEEN)
        num_learned = len(emoji.load(UNSEEN)) - len(kept)
        self._step(
            f"数据：{num_learned:,} 张图片用来微调，{len(kept):,} 张留着考试，微调时不看",
            f"data: {num_learned:,} drawings to learn from, {len(kept):,} held out for the tests",
        )
        emoji.write_dataset(self.data, seed=self.seed, vendor=UNSEEN, held_out_share=HELD_OUT)
        self._call("cn-clip dataset check", check_dataset, "--data_dir", self.data, "--splits", "train,valid")
        self._call("cn-clip dataset build", build_lmdb_dataset, "--data_dir", self.data, "--splits", "train,valid")
        turn = "python -m cn_clip.eval.transform_ir_annotation_to_tr"
        self._call(turn, transform_ir_annotation_to_tr, "--input", self.data / "valid_texts.jsonl")
        return num_learned, len(kept)

    def measure(self, stage: str, model: str | Path) -> Scores:
        """Recall among the held-out pictures, in percent: names look for their pictures, pictures for their names."""
        images, texts = self._features(stage)
        self._call(
            "cn-clip features",
            extract_features,
            *("--extract-image-feats", "--extract-text-feats", "--img-batch-size", 256, "--text-batch-size", 256),
            *("--image-data", self.data / "lmdb" / "valid" / "imgs", "--text-data", self.data / "valid_texts.jsonl"),
            *("--image-feat-output-path", images, "--text-feat-output-path", texts, "--resume", model),
        )
        return {way: self.recall(stage, way) for way in page.DIRECTIONS}

    def recall(self, stage: str, way: str) -> dict[str, float]:
        """Finds the ten nearest for every query and scores them."""
        images, texts = self._features(stage)
        query = way.partition("_")[0]
        standard = self.data / ("valid_texts.jsonl" if query == "text" else "valid_texts.tr.jsonl")
        predictions = self.results / f"{stage}_{way}.predictions.jsonl"
        result = self.results / f"{stage}_{way}.json"
        self._call(
            "cn-clip topk",
            make_topk_predictions,
            *("--image-feats", images, "--text-feats", texts),
            *("--query", query, "--top-k", 10, "--output", predictions),
        )
        self._call("cn-clip recall", evaluation, standard, predictions, result, "--query", query)
        scores: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["scoreJson"]
        return scores

    def classify(self, model: str | Path) -> float:
        """Sorts pictures into classes of which the model is only told the names."""
        labels = emoji.drawn_classes(UNSEEN)
        emoji.write_classification(self.classes, labels, vendor=UNSEEN)
        words = self._announce(
            "cn-clip zeroshot",
            *("--datapath", self.classes / "test", "--label-file", self.classes / "label_cn.txt"),
            *("--dataset", "emoji", "--save-dir", self.results, "--num-workers", 0, "--resume", model),
        )
        options = command.parse(zeroshot_evaluation.Options, words)
        with self._logged():
            accuracy = zeroshot_evaluation.evaluate(options, command.Speaker(quiet=False)).top1
        self._step(
            f"零样本分类（不训练，只给 {len(labels)} 个中文类别名）：{accuracy:.1%} 分对",
            f"zero-shot classification (no training, only {len(labels)} Chinese class names): {accuracy:.1%} correct",
        )
        return accuracy

    def train(self, num_held_out: int) -> None:
        """Fine-tunes the bundled model on the other drawings, or goes on from where a demo was stopped."""
        self._step(f"微调 {self.steps} 步", f"fine-tuning, {self.steps} steps")
        entry, steps = zoo.BUNDLED[MODEL], self.steps
        self._call(
            "cn-clip train",
            training,
            *("--train-data", self.data / "lmdb" / "train", "--val-data", self.data / "lmdb" / "valid"),
            *("--init", MODEL, "--vision-model", entry.vision, "--text-model", entry.text),
            *("--logs", self.run_folder.parent, "--name", self.run_folder.name),
            *(
                "--batch-size",
                BATCH,
                "--valid-batch-size",
                min(BATCH, num_held_out),
                "--num-workers",
                1,
                "--valid-num-workers",
                0,
            ),
            *("--max-steps", steps, "--lr", RATE, "--beta2", 0.98, "--wd", 0.1, "--warmup", max(1, steps // 10)),
            *("--valid-epoch-interval", -1, "--valid-step-interval", max(1, steps // 4)),
            *("--save-epoch-frequency", -1, "--log-interval", 5, "--multi-positive", "--seed", self.seed),
        )

    def compare(self, facts: Facts) -> None:
        """Notes how the rank of every held-out name's picture changed, and the queries of the grid with their hits."""
        pictures = {picture.number: picture for picture in emoji.load(UNSEEN)}
        stages = ("before", "after") if self.steps else ("before",)
        images = {stage: read_features(self._features(stage)[0], "image_id") for stage in stages}
        texts = {stage: read_features(self._features(stage)[1], "text_id") for stage in stages}
        names, gallery = (list(map(int, found["before"].ids)) for found in (texts, images))
        pairs = [(gallery.index(number), row) for row, number in enumerate(names)]
        ranks = {stage: rank_all(images[stage].vectors, texts[stage].vectors, pairs).ranks_M for stage in stages}
        gains = 1 / ranks[stages[-1]] - 1 / ranks["before"]
        if self.steps:
            better, worse = int((gains > 0).sum()), int((gains < 0).sum())
            facts.changes = better, worse, len(gains) - better - worse
        order = np.argsort(-gains, kind="stable").tolist()
        chosen = order[:MOST_BETTER] + [row for row in order[-MOST_WORSE:] if gains[row] < 0 or not self.steps]
        for row in chosen:
            hits = {
                stage: top_k(texts[stage].vectors[[row]], images[stage].vectors, GRID_COLUMNS).indices[0].tolist()
                for stage in stages
            }
            facts.found.append(
                Found(
                    pictures[names[row]],
                    {stage: int(ranks[stage][row]) for stage in stages},
                    {stage: [pictures[gallery[column]] for column in columns] for stage, columns in hits.items()},
                )
            )

    def draw(self, facts: Facts) -> None:
        """The picture grid, a PNG."""
        notes = {"before": both("微调前：第 {:,} 名", "before: rank {:,}")}
        notes["after"] = both("微调后：第 {:,} 名", "after: rank {:,}")
        rows = [
            Row(
                one.own.name,
                [(hit.picture, hit.name, one.is_right(hit)) for hit in hits],
                notes[stage].format(one.ranks[stage]),
            )
            for one in facts.found
            for stage, hits in one.hits.items()
        ]
        held_out = f"{facts.num_held_out:,}"
        title = both(
            f"按名称找图：{held_out} 张没参加微调的图片", f"Pictures by name, among {held_out} held out of training"
        )
        draw_grid(rows, self.grid, title=title, legend=page.legend())

    def write_page(self, facts: Facts) -> None:
        """The page, as a whole or not at all."""
        run = self.run_folder if self.steps else None
        model = self.checkpoint.resolve() if self.steps else MODEL
        drawings = next_steps.drawings(self.data / "lmdb" / "train", self.folder / "emoji.index", model, "下雨天")
        text = page.page(facts, run, self.commands, next_steps.own_folder(), drawings)
        with atomic_write(self.page) as stream:
            stream.write(text)

    # --- what people are told

    def tell_scores(self, scores: Scores, num_pictures: int) -> None:
        """R@1 of both directions."""
        text, image = (scores[way]["r1"] for way in page.DIRECTIONS)
        self.say(
            both(
                f"      以文搜图 R@1 {text:.1f} %，以图搜文 R@1 {image:.1f} %"
                f"（R@1：{num_pictures:,} 个里排第一的就是对的）",
                f"      text → image R@1 {text:.1f} %, image → text R@1 {image:.1f} % "
                f"(R@1: the first of {num_pictures:,} is the right one)",
            )
        )

    def tell_end(self, facts: Facts) -> None:
        """How long it took, and where the page is."""
        log, path = self.folder / LOG, self.page.resolve()
        self.say(
            both(
                f"用时 {facts.seconds:.0f} 秒；每一步的命令和输出都在 {log}",
                f"Took {facts.seconds:.0f} s; the commands and what they printed: {log}",
            )
        )
        self.say(
            both(f"结果是一个网页，打开它：{next_steps.opener(path)}", f"Open the page: {next_steps.opener(path)}")
        )

    def _step(self, chinese: str, english: str) -> None:
        self.bar.advance(min(self.number, 1))
        self.number += 1
        self.say(f"[{self.number}/{self.num_steps}] {both(chinese, english)}")

    # --- commands

    def _features(self, stage: str) -> tuple[Path, Path]:
        return self.results / f"{stage}.img_feat.jsonl", self.results / f"{stage}.txt_feat.jsonl"

    def _call(self, name: str, module: Any, *arguments: object) -> None:
        options = command.parse(module.Options, self._announce(name, *arguments))
        with self._logged():
            status = module.run(options)
        if status:
            raise CnClipError(f"{name}: ended with status {status}")

    def _announce(self, name: str, *arguments: object) -> list[str]:
        words = [str(argument) for argument in arguments]
        line = f"{name} {shlex.join(words)}"
        self.commands.append(line)
        print(f"\n$ {line}", file=self.log)
        return words

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """What is printed and logged inside goes to the log."""
        with contextlib.redirect_stdout(self.log), contextlib.redirect_stderr(self.log):
            yield
