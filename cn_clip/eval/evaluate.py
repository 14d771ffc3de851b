"""Runs a benchmark by name, and prints what was measured beside the published figures of the model.

cn-clip evaluate muge --data datasets/MUGE
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cn_clip import command, settings, spelling, terminal, zoo
from cn_clip.clip import choice
from cn_clip.clip.choice import DEFAULT_MODEL, Choice
from cn_clip.errors import ConfigError, OutputError
from cn_clip.evaluation import benchmark_sets
from cn_clip.evaluation.benchmark_sets import RESULT_FILE, Metric, Split
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps
from cn_clip.language import both, counted
from cn_clip.option_types import ContextLength, Json, NumWorkers
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH
from cn_clip.zoo_results import CHINESE_CLIP, README, Query, Result, Setup

if TYPE_CHECKING:
    from cn_clip.evaluation.classification import Measured

# In Chinese and in English.
DIRECTIONS: Mapping[Query, tuple[str, str]] = {
    "text": ("以文搜图", "text → image"),
    "image": ("以图搜文", "image → text"),
}
SETUPS: Mapping[Setup, tuple[str, str]] = {
    "zero-shot": ("公布，零样本", "published, zero-shot"),
    "fine-tuned": ("公布，微调", "published, fine-tuned"),
}
METRICS: Mapping[Metric, tuple[str, str]] = {
    "top1": ("top-1", "top-1"),
    "mean_per_class": ("各类平均", "mean per class"),
    "map_11_point": ("11 点 mAP", "11-point mAP"),
}
_NOT_PUBLISHED = "—"


@dataclass(frozen=True)
class ModelChoice(choice.ModelSettings):
    """Which model computes the features, and how."""

    model: str | None = None
    """A published or bundled model, or one of another family, hf:FOLDER or open_clip:ARCHITECTURE@FILE; ViT-B-16 if no
    checkpoint is given. Beside --checkpoint: the model whose weights these are"""
    checkpoint: str | None = None
    """Weights of your own: a file or a transformers folder"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures, and texts, in a batch"""
    num_workers: NumWorkers = None
    decode: choice.Decoding = "exact"

    def __post_init__(self) -> None:
        if self.model and self.checkpoint and zoo.named(self.model) is None:
            known = zoo.available_models()
            raise ConfigError(
                f"--model {self.model}: beside --checkpoint it says what the weights are of; "
                f"expected one of {', '.join(known)}{spelling.meant(self.model, known)}"
            )
        choice.check(self.chosen)
        settings.check(self)

    @property
    def chosen(self) -> Choice:
        """What is opened: the checkpoint, with the towers of the model it is said to be of, or that model."""
        named = zoo.named(self.model) if self.model and self.checkpoint else None
        return replace(
            super().chosen,
            model=self.checkpoint or self.model or DEFAULT_MODEL,
            vision=named.vision if named else None,
            text=named.text if named else None,
            decode=self.decode,
        )

    @property
    def model_name(self) -> str | None:
        """The model meant; None for a checkpoint of which nothing is said."""
        return self.model or (None if self.checkpoint else DEFAULT_MODEL)

    @property
    def file_name(self) -> str:
        """The model in the names of files: only letters, digits, `_`, `-` and `.`.

        A checkpoint of a run has the name of the run before its own; backend, precision and merged tokens follow if
        they are not the usual ones.
        """
        names = [self.model or DEFAULT_MODEL]
        if self.checkpoint:
            path = Path(os.path.abspath(self.checkpoint))
            # The folder of a run in which the training keeps its checkpoints; all runs name them alike.
            names = [path.parent.parent.name, path.stem] if path.parent.name == "checkpoints" else [path.stem]
        given: tuple[str, str] = self.backend, self.precision
        arithmetic = [one for one in given if one not in ("torch", "fp32", "amp")]
        arithmetic += [f"merge{self.merge_tokens}"] if self.merge_tokens else []
        arithmetic += [f"first{self.dimensions}"] if self.dimensions else []
        return re.sub(r"[^\w.-]+", "_", "-".join([*names, *arithmetic]))


@dataclass(frozen=True)
class Options(ModelChoice):
    """Features, search and recall, or zero-shot classification, of a benchmark; beside the published figures."""

    benchmark: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="BENCHMARK", help_behavior_hint="(required)")
    ] = ""
    """muge, flickr30k-cn, coco-cn, xtd-zh, xm3600-zh, imagenet-cn, or a classification set of ELEVATER such as
    cifar-100"""
    data: command.Required = None
    """Folder of the dataset: lmdb/ and *_texts.jsonl, or test/ with a folder a class"""
    split: Split | None = None
    """Default: the one of the published figures, valid of MUGE, test of all others"""
    context_length: ContextLength = CONTEXT_LENGTH
    output: str | None = None
    """Folder for features, predictions and result.json; default: evaluations/BENCHMARK-SPLIT-MODEL,
    where MODEL is RUN-CHECKPOINT for a file in RUN/checkpoints, with backend and precision unless torch and fp32"""
    json: Json = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if benchmark_sets.known_name(self.benchmark) is None:
            known = benchmark_sets.names()
            nearest = spelling.nearest(benchmark_sets.folded(self.benchmark), known)
            hint = f"did you mean {nearest}? " if nearest else ""
            raise ConfigError(f"no benchmark {self.benchmark!r}; {hint}expected one of: {', '.join(known)}")
        if not self.data:
            raise ConfigError("--data: expected the folder of the dataset")
        if self.name in benchmark_sets.classification_sets() and self.split == "valid":
            raise ConfigError(f"--split valid: {self.name} is measured on its test pictures; leave --split out")
        if self.output == "":
            raise ConfigError("--output: expected a folder, got an empty path")

    @property
    def chosen(self) -> Choice:
        """The model asked for, and how long its texts are."""
        return replace(super().chosen, context_length=self.context_length)

    @property
    def name(self) -> str:
        """The benchmark as the package calls it."""
        return benchmark_sets.known_name(self.benchmark) or self.benchmark

    @property
    def used_split(self) -> Split:
        """The split that is measured."""
        known = benchmark_sets.RETRIEVAL_SETS.get(self.name)
        return self.split or (known.split if known else "test")

    @property
    def folder(self) -> Path:
        """Where all files go."""
        return Path(self.output or f"evaluations/{self.name}-{self.used_split}-{self.file_name}")


def run(options: Options) -> None:
    """Measures and reports; raises CnClipError saying which part of the dataset is missing or faulty."""
    say, data = command.Speaker(quiet=options.json), Path(options.data or "")
    sizes: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.num_workers}
    if options.name in benchmark_sets.RETRIEVAL_SETS:
        from cn_clip.evaluation import retrieval

        retrieval.check_split(data, options.used_split)
        _make(options.folder)
        queries = benchmark_sets.RETRIEVAL_SETS[options.name].queries
        recalls = retrieval.benchmark(data, options.used_split, queries, options.chosen, options.folder, say, **sizes)
        found = _report_recalls(options, recalls, say)
    else:
        from cn_clip.evaluation import classification

        dataset = classification.read_dataset(data, options.name)
        _make(options.folder)
        measured = classification.benchmark(dataset, options.chosen, options.folder, say, **sizes)
        found = _report_accuracy(options, measured, len(dataset.labels), say)
    facts = {"benchmark": options.name, "split": options.used_split, "model": options.model_name}
    result = {**facts, "checkpoint": options.checkpoint, "output": str(options.folder), **found}
    with atomic_write(options.folder / RESULT_FILE) as stream:
        stream.write(dumps(result) + "\n")
    say(both(f"特征与结果保存在 {options.folder}", f"features and results are in {options.folder}"))
    say.result(result)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {folder}: cannot be made ({error.strerror}); name another folder") from error


def _report_recalls(
    options: Options, measured: Mapping[Query, Mapping[str, float]], say: command.Speaker
) -> dict[str, Any]:
    """Prints recalls beside the published ones of the split; returns both for the result."""
    benchmark, split, model = benchmark_sets.RETRIEVAL_SETS[options.name], options.used_split, _published_model(options)
    is_comparable = split == benchmark.split
    published = benchmark.published(model) if is_comparable else []
    others = benchmark.others() if is_comparable else []
    setups = _by_setup(published)
    rows: list[tuple[str, ...]] = []
    for query, scores in measured.items():
        way = f"{benchmark.title} {split}" + both("，", ", ") + both(*DIRECTIONS[query])
        rows.append((way, "R@1", "R@5", "R@10", "MR"))
        here = both("  本次测得：", "  measured: ") + options.chosen.model
        rows.append((here, *(f"{score:.1f}" for score in scores.values())))
        for name, one in [*((model, one) for one in published), *others]:
            if one.query == query:
                shown = (_NOT_PUBLISHED if figure is None else f"{figure:.1f}" for figure in _figures(one).values())
                rows.append((f"  {both(*SETUPS[one.setup])}{both('：', ': ')}{name}", *shown))
    for line in terminal.align(rows, right=frozenset({1, 2, 3, 4})):
        say(line)
    if split != benchmark.split:
        say(
            both(
                f"公布的指标只有 {benchmark.split} 上的，不能相比",
                f"the published figures are of {benchmark.split} only, so they are not shown",
            )
        )
    else:
        if not published:
            say(_no_figures(options))
        for source in dict.fromkeys(one.source for one in [*published, *(one for _, one in others)]):
            say(both(f"公布的指标来自 {source}", f"published figures: {source}"))
    kept = {"model": model, **setups, "source": published[0].source} if published else None
    names = dict.fromkeys(name for name, _ in others)
    known = {name: _by_setup([one for owner, one in others if owner == name]) for name in names}
    return {"measured": measured, "published": kept, "others": known}


def _by_setup(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float | None]]]:
    setups: dict[str, dict[str, dict[str, float | None]]] = {}
    for one in results:
        setups.setdefault(one.setup, {})[one.query] = _figures(one)
    return setups


def _figures(one: Result) -> dict[str, float | None]:
    return {"r1": one.recall_1, "r5": one.recall_5, "r10": one.recall_10, "mean_recall": one.mean}


def _report_accuracy(options: Options, found: "Measured", num_labels: int, say: command.Speaker) -> dict[str, Any]:
    """Prints the measures beside the published one, if it is of as many classes; returns both for the result."""
    benchmark, model = benchmark_sets.classification_sets()[options.name], _published_model(options)
    figure, num_classes = benchmark.published.get(model or ""), len(benchmark_sets.class_names(options.name))
    others = benchmark.others
    if num_labels != num_classes:
        figure, others = None, {}
    pictures = both(f"，{found.num_pictures} 张图片", f", {counted(found.num_pictures, 'image')}")
    rows = [(f"{benchmark.title} test{pictures}", "%")]
    for metric, value in found.measures.items():
        here = both(f"  本次测得，{METRICS[metric][0]}：", f"  measured, {METRICS[metric][1]}: ")
        rows.append((f"{here}{options.chosen.model}", f"{value:.1f}"))
    known = ({} if figure is None else {str(model): figure}) | dict(others)
    for name, value in known.items():
        rows.append((f"  {both(*SETUPS['zero-shot'])}{both('：', ': ')}{name}", f"{value:.1f}"))
    for line in terminal.align(rows, right=frozenset({1})):
        say(line)
    if found.own_labels:
        say(
            both(
                "没有 label_cn.txt，用了本包自带的中文类别名",
                "no label_cn.txt there; using the Chinese class names of this package",
            )
        )
    if num_labels != num_classes:
        say(
            both(
                f"注意：标签有 {num_labels} 类，{benchmark.title} 有 {num_classes} 类，不与公布的指标相比；"
                "自己的数据请用 cn-clip zeroshot",
                f"note: there are {num_labels} labels, but {benchmark.title} has {num_classes} classes, so this is not "
                "compared with the published figures; for your own data use cn-clip zeroshot",
            )
        )
    else:
        if figure is None:
            say(_no_figures(options))
        for source in [CHINESE_CLIP, README] if figure is not None else [README]:
            say(both(f"公布的指标来自 {source}", f"published figures: {source}"))
    if figure is not None and benchmark.elevater_metric != "top1":
        say(
            both(
                f"出处没有写明用什么指标；ELEVATER 规定的是{METRICS[benchmark.elevater_metric][0]}",
                f"the source does not name its metric; ELEVATER prescribes {METRICS[benchmark.elevater_metric][1]}",
            )
        )
    published = None
    if figure is not None:
        published = {"model": model, "zero-shot": figure, "elevater_metric": benchmark.elevater_metric}
        published |= {"source": CHINESE_CLIP}
    facts = {"num_pictures": found.num_pictures, "own_labels": found.own_labels, "predictions": str(found.predictions)}
    return {**facts, "measured": found.measures, "published": published, "others": dict(others)}


def _published_model(options: Options) -> str | None:
    return benchmark_sets.published_model(options.model_name, options.checkpoint)


def _no_figures(options: Options) -> str:
    if options.checkpoint and not options.model:
        return both(
            "看不出这份权重是哪个模型的，没有公布的指标可比；用 --model 说明",
            "nothing says which model this checkpoint is; name it with --model to see published figures",
        )
    return both(f"{options.chosen.model} 没有公布的指标", f"{options.chosen.model} has no published figures")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
