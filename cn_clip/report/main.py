"""One HTML file on a run and what its model finds: `cn-clip report RUN [--data LMDB/valid] …`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from cn_clip import command, settings
from cn_clip.errors import ConfigError
from cn_clip.option_types import ContextLength, Device, NumThreads, NumWorkers, Templates
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    from cn_clip.clip.encoder import Encoder
    from cn_clip.report.confusion import Confusion
    from cn_clip.report.markup import Markup
    from cn_clip.report.page import Section
    from cn_clip.report.queries import Retrieval
    from cn_clip.report.run_folder import Run

MOST_PAIRS = 12
MOST_HITS = 10

Words: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """Writes a page that shows how a run went, its best and worst queries, what it confuses, what it looks at.

    Each part is there when its input is given. The page is one file that fetches nothing.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run, LOGS/NAME of the training; without one --checkpoint says what is looked at"""
    output: str = "report.html"
    """The file to write"""
    checkpoint: str | None = None
    """Model of the other parts: a file, a folder or a published name; default: the best checkpoint of the run"""
    data: str | None = None
    """Built split, such as LMDB/valid: its best and worst text queries with pictures, and recall"""
    k: Annotated[int, tyro.conf.arg(aliases=("--top-k",)), Range(least=1, most=MOST_HITS)] = 5
    """Pictures shown for each query"""
    zeroshot: str | None = None
    """Folder of test pictures, one folder a class, for the confusion matrix; with --labels"""
    labels: str | None = None
    """Text file of the class labels, one a line"""
    dataset: str = "imagenet"
    """Name of the zero-shot dataset, which chooses the prompt templates"""
    templates: Templates = None
    picture: Words = ()
    """Pictures to look into, each with the --text of its place; one picture or one text serves all of the other"""
    text: Words = ()
    """Texts for --picture"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures or texts in a batch"""
    num_workers: NumWorkers = 2
    context_length: ContextLength = CONTEXT_LENGTH
    device: Device = "auto"
    num_threads: NumThreads = None
    download_root: str | None = None
    """Folder of downloaded models; default: ~/.cache/clip"""
    json: bool = False
    """Print the facts as one JSON object"""

    def __post_init__(self) -> None:
        if not self.run and not (self.checkpoint and self.needs_model):
            raise ConfigError(
                "RUN: expected the folder of a run, or --checkpoint with --data, --zeroshot or --picture and --text"
            )
        if self.run and self.checkpoint and not self.needs_model:
            raise ConfigError("--checkpoint: nothing to do for it; add --data, --zeroshot, or --picture and --text")
        for first, second in (("zeroshot", "labels"), ("picture", "text")):
            if bool(getattr(self, first)) != bool(getattr(self, second)):
                raise ConfigError(f"--{first} and --{second}: expected both or neither")
        self._check_numbers()
        self._check_parts()
        self.pairs  # noqa: B018 - raises

    def _check_numbers(self) -> None:
        settings.check(self)

    def _check_parts(self) -> None:
        """Raises ConfigError for a setting of a part that is not asked for."""
        for name, part in (("templates", "zeroshot"), ("dataset", "zeroshot"), ("k", "data")):
            if getattr(self, name) != getattr(Options, name) and not getattr(self, part):
                raise ConfigError(f"--{name.replace('_', '-')}: nothing to do for it; add --{part}")

    @property
    def needs_model(self) -> bool:
        """Whether a part needs the model itself."""
        return bool(self.data or self.zeroshot or self.picture or self.text)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(picture, text) of each pair to look into; raises ConfigError where they do not fit together."""
        pictures, texts = self.picture, self.text
        count = max(len(pictures), len(texts))
        if {len(pictures), len(texts)} - {1, count}:
            raise ConfigError(
                f"--picture and --text: {len(pictures)} and {len(texts)}; expected as many of both, or one of either"
            )
        if count > MOST_PAIRS:
            raise ConfigError(f"--picture and --text: {count} pairs; expected at most {MOST_PAIRS} in a page")
        repeated = (list(given) * (count if len(given) == 1 else 1) for given in (pictures, texts))
        return list(zip(*repeated, strict=True))

    def check_output(self) -> None:
        """Raises ConfigError where the page would take the place of what is read, or of what a run left."""
        from cn_clip.files import refuse_inputs

        refuse_inputs("--output", self.output, [self.checkpoint, self.labels, self.templates, *self.picture])
        refuse_inputs("--output", self.output, self._files_of_run())
        target = Path(os.path.realpath(self.output))
        for folder in (self.data, self.zeroshot, self.checkpoint):
            if folder and Path(folder).is_dir() and target.is_relative_to(os.path.realpath(folder)):
                raise ConfigError(f"--output {self.output}: lies in {folder}, which it reads; give another path")

    def _files_of_run(self) -> list[Path]:
        """All files of the run, its checkpoints and events too; not pages, which earlier reports may be."""
        found = (path for pattern in ("*", "*/*") for path in Path(self.run).glob(pattern)) if self.run else ()
        return [path for path in found if path.is_file() and path.suffix not in (".html", ".htm")]


def run(options: Options) -> None:
    """Writes the page, as a whole or not at all; raises CnClipError naming what cannot be read."""
    from cn_clip.files import atomic_write, replaceable
    from cn_clip.report.page import page
    from cn_clip.report.run_folder import read_run

    say = command.Speaker(quiet=options.json)
    options.check_output()
    replaceable(options.output)
    found = read_run(Path(options.run)) if options.run else None
    facts: dict[str, Any] = {}
    sections: list[Section] = []
    if found is not None:
        _add_run(found, sections, facts)
    subtitle: str | Markup = f"训练记录 / the run in {options.run}"
    title = found.name if found else str(options.checkpoint)
    if options.needs_model:
        checkpoint = options.checkpoint or str(found.best_checkpoint() if found else "")
        subtitle = f"模型 / model: {checkpoint}"
        facts["checkpoint"] = checkpoint
        _add_model_parts(options, _open(options, checkpoint, say), sections, facts, say)
    text = page(title, _quoted(subtitle), sections, _missing(options))
    with atomic_write(options.output) as stream:
        stream.write(text)
    size = len(text.encode())
    say(f"报告 / report: {options.output} ({size / 1e6:.2f} MB)")
    say.result({"report": options.output, "bytes": size, **facts})


def _quoted(text: str) -> "Markup":
    from cn_clip.report.markup import quoted

    return quoted(text)


def _open(options: Options, checkpoint: str, say: command.Speaker) -> "Encoder":
    from cn_clip import ranks
    from cn_clip.clip.backends.pytorch import TorchBackend
    from cn_clip.clip.encoder import Encoder
    from cn_clip.clip.loading import open_model

    device = ranks.choose_device(options.device)
    say(f"打开模型 / opening {checkpoint}")
    model, _ = open_model(checkpoint, download_root=options.download_root)
    longest = model.config.text.text_max_position_embeddings
    if options.context_length > longest:
        raise ConfigError(
            f"--context-length {options.context_length}: {checkpoint} takes texts of at most {longest} tokens; "
            f"use --context-length {longest}"
        )
    backend = TorchBackend(model, device=device, num_threads=options.num_threads)
    return Encoder(backend, context_length=options.context_length)


def _add_run(found: "Run", sections: "list[Section]", facts: dict[str, Any]) -> None:
    from cn_clip.report.sections import run_section

    sections.append(run_section(found))
    best = found.best()
    _, losses = found.points("train", "loss")
    facts["run"] = {
        "name": found.name,
        "source": found.source,
        "last_step": found.last_step,
        "max_steps": found.max_steps,
        "seconds": found.log.seconds or None,
        "last_loss": float(losses[-1]) if len(losses) else None,
        "best_step": best[0] if best else None,
        "best_mean_recall": best[1] if best else None,
    }


def _add_model_parts(
    options: Options, encoder: "Encoder", sections: "list[Section]", facts: dict[str, Any], say: command.Speaker
) -> None:
    from cn_clip.report import sections as parts

    settings = {"batch_size": options.batch_size, "num_threads": options.num_workers}
    if options.data:
        from cn_clip.report import queries

        say("计算图文特征，检索 / encoding and ranking the split")
        retrieval = queries.examine(encoder, Path(options.data), k=options.k, **settings)
        sections.append(parts.retrieval_section(retrieval))
        facts["retrieval"] = _retrieval_facts(retrieval)
    if options.zeroshot:
        from cn_clip.evaluation.templates import load_templates
        from cn_clip.report import confusion

        say("零样本分类 / zero-shot classification")
        templates = load_templates(options.dataset, Path(options.templates) if options.templates else None)
        folder, labels = Path(options.zeroshot), Path(options.labels or "")
        matrix = confusion.examine(encoder, folder, labels, templates, **settings)
        sections.append(parts.confusion_section(matrix))
        facts["zeroshot"] = _zeroshot_facts(matrix)
    if options.pairs:
        from cn_clip.report import regions

        views = [regions.examine(encoder, *pair) for pair in options.pairs]
        sections.append(parts.pairs_section(views))
        facts["pairs"] = [
            {"picture": view.path, "text": view.text, "similarity": view.similarity, "tokens": view.tokens}
            for view in views
        ]


def _retrieval_facts(retrieval: "Retrieval") -> dict[str, Any]:
    sizes = {"num_images": retrieval.num_images, "num_texts": retrieval.num_texts}
    groups = {
        name: [{"text": query.text, "rank": query.rank, "similarity": query.right.score} for query in queries]
        for name, queries in (("best", retrieval.best), ("median", retrieval.median), ("worst", retrieval.worst))
    }
    return {**sizes, **retrieval.recall.values(), **groups}


def _zeroshot_facts(matrix: "Confusion") -> dict[str, Any]:
    labels = matrix.labels
    return {
        "top1": matrix.accuracy.top1,
        "top5": matrix.accuracy.top5,
        "per_class": [
            {"label": label, "accuracy": share} for label, share in zip(labels, matrix.accuracy.per_class, strict=True)
        ],
        "mistakes": [
            {"label": labels[one.true], "taken_for": labels[one.taken], "count": one.count, "sample": one.sample}
            for one in matrix.mistakes
        ],
    }


def _missing(options: Options) -> "list[Markup]":
    from cn_clip.report.markup import both, element, joined

    possible = (
        (options.run, "RUN", "训练过程与曲线", "facts and curves of a run"),
        (options.data, "--data LMDB/valid", "最好与最差的查询，配图", "best and worst queries with pictures"),
        (options.zeroshot, "--zeroshot FOLDER --labels FILE", "零样本分类的混淆矩阵", "confusion matrix"),
        (options.picture, "--picture FILE --text TEXT", "文字在图片的哪里，哪个词重要", "places and tokens of a pair"),
    )
    return [
        joined([element("code", flag), "：", both(chinese, english)])
        for given, flag, chinese, english in possible
        if not given
    ]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
