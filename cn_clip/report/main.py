"""One HTML file on a run and what its model finds: `cn-clip report RUN [--data LMDB/valid] …`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from cn_clip import command, settings
from cn_clip.clip.choice import Choice
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write, refuse_inputs, replaceable
from cn_clip.language import both
from cn_clip.option_types import ContextLength, Device, NumThreads, NumWorkers, Templates
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

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
    """Pictures to look into, each with the --text of its position; one picture or one text serves all of the other"""
    text: Words = ()
    """Texts for --picture"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures or texts in a batch"""
    num_workers: NumWorkers = None
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
        settings.check(self)
        for name, part in (("templates", "zeroshot"), ("dataset", "zeroshot"), ("k", "data")):
            if settings.is_given(self, name) and not getattr(self, part):
                raise ConfigError(f"{settings.flag(name)}: nothing to do for it; add --{part}")
        self.pairs  # noqa: B018 - raises

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
        """Raises ConfigError where the page would replace something that is read, or that a run left."""
        refuse_inputs("--output", self.output, [self.checkpoint, self.labels, self.templates, *self.picture])
        found = [path for pattern in ("*", "*/*") for path in Path(self.run).glob(pattern)] if self.run else []
        # Its checkpoints and events too; not pages, which earlier reports may be.
        files = [path for path in found if path.is_file() and path.suffix not in (".html", ".htm")]
        refuse_inputs("--output", self.output, files)
        target = Path(os.path.realpath(self.output))
        for folder in (self.data, self.zeroshot, self.checkpoint):
            if folder and Path(folder).is_dir() and target.is_relative_to(os.path.realpath(folder)):
                raise ConfigError(f"--output {self.output}: lies in {folder}, which it reads; give another path")


def run(options: Options) -> None:
    """Writes the page, as a whole or not at all; raises CnClipError naming what cannot be read."""
    from cn_clip.report import page, run_folder

    say = command.Speaker(quiet=options.json)
    options.check_output()
    replaceable(options.output)
    parts: dict[str, page.Part] = {}
    facts: dict[str, Any] = {}
    title, subtitle = str(options.checkpoint), both(f"训练记录 {options.run}", f"the run in {options.run}")
    checkpoint = options.checkpoint or ""
    if options.run:
        found = run_folder.read_run(Path(options.run))
        title, parts["run"], facts["run"] = found.name, page.run_part(found), found.facts()
        if options.needs_model:
            checkpoint = checkpoint or str(found.best_checkpoint())
    if options.needs_model:
        subtitle, facts["checkpoint"] = both(f"模型 {checkpoint}", f"model {checkpoint}"), checkpoint
        from cn_clip.report import findings  # imports torch, which the curves of a run do not need

        sizes: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.num_workers}
        chosen = Choice(
            checkpoint,
            device=options.device,
            num_threads=options.num_threads,
            download_root=options.download_root,
            context_length=options.context_length,
        )
        encoder = findings.open_encoder(chosen, say)
        if options.data:
            say(both("计算图文特征，检索", "encoding and ranking the split"))
            retrieval = findings.examine_queries(encoder, Path(options.data), k=options.k, **sizes)
            parts["retrieval"], facts["retrieval"] = page.retrieval_part(retrieval), retrieval.facts()
        if options.zeroshot:
            say(both("零样本分类", "zero-shot classification"))
            confusion = findings.examine_classes(
                encoder, Path(options.zeroshot), Path(options.labels or ""), options.dataset, options.templates, **sizes
            )
            parts["zeroshot"], facts["zeroshot"] = page.zeroshot_part(confusion), confusion.facts()
        if options.pairs:
            views = [findings.examine_pair(encoder, *pair) for pair in options.pairs]
            parts["pairs"], facts["pairs"] = page.pairs_part(views), [view.facts() for view in views]
    text = page.page(title, subtitle, parts)
    with atomic_write(options.output) as stream:
        stream.write(text)
    size = len(text.encode())
    say(both(f"报告：{options.output}（{size / 1e6:.2f} MB）", f"report: {options.output} ({size / 1e6:.2f} MB)"))
    say.result({"report": options.output, "bytes": size, **facts})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
