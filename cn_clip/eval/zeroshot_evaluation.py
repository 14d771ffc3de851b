"""Classifies pictures by Chinese labels, zero-shot: `python cn_clip/eval/zeroshot_evaluation.py --datapath=… …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, drop_in, settings
from cn_clip.clip import choice
from cn_clip.clip.templates import load_templates, read_labels
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import refuse_inputs, replaceable
from cn_clip.language import both
from cn_clip.option_types import (
    BatchSize,
    ContextLength,
    Json,
    NumWorkers,
    Templates,
)
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    from cn_clip.evaluation.zeroshot import Accuracy

MOST_CLASSES_SHOWN = 50

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(choice.CheckpointSettings):
    """Prints top-1, top-5 and per-class accuracy, and writes the probabilities as ELEVATER's JSON."""

    datapath: str
    """Folder of test pictures, one folder a class: named by the label's number, or sorted as the labels are"""
    label_file: command.Required = None
    """Text file of the labels, one a line"""
    dataset: str = "imagenet"
    """Name of the dataset; chooses the prompt templates and names the output file"""
    index: str = ""
    """JSON list that puts the pictures into ELEVATER's order"""
    save_dir: str = ""
    """Folder for the ELEVATER JSON file"""
    img_batch_size: BatchSize = 64
    context_length: ContextLength = CONTEXT_LENGTH
    num_workers: NumWorkers = None
    decode: choice.Decoding = "exact"
    templates: Templates = None
    json: Json = False

    ADDED = ("num_threads", "strict_fp32", "templates", "trust_remote_code")  # see `command.spelled_out`

    def __post_init__(self) -> None:
        choice.check(self.chosen)
        if self.label_file is None:
            raise ConfigError("--label-file: expected a text file with one label a line")
        if self.dataset in ("", ".", "..") or "/" in self.dataset or "\\" in self.dataset:
            raise ConfigError(f"--dataset: expected a name, which is that of the output file too, got {self.dataset!r}")
        settings.check(self)

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode, context_length=self.context_length)

    @property
    def output_file(self) -> Path:
        """The ELEVATER file."""
        return Path(self.save_dir) / f"{self.dataset}.json"


def run_command(options: Options) -> None:
    """Evaluates and reports; raises CnClipError when labels, folders or checkpoint do not fit together."""
    evaluate(options, command.Speaker(quiet=options.json))


def evaluate(options: Options, say: command.Speaker) -> "Accuracy":
    """Evaluates, reports to `say`, writes the ELEVATER file and returns the accuracy."""
    from cn_clip.evaluation import classification, zeroshot

    say.params(options)
    path, label_file = options.output_file, options.label_file or ""
    refuse_inputs("--save-dir: the file", path, [label_file, options.index, options.templates])
    for folder in (path.parent, *path.parent.parents):
        if folder.exists() and not folder.is_dir():
            raise DataError(f"--save-dir {options.save_dir}: {folder} is no folder; name another one")
    if path.parent.exists():
        replaceable(path)
    labels = read_labels(Path(label_file))
    found = classification.classify(
        options.chosen,
        options.datapath,
        labels,
        load_templates(options.dataset, Path(options.templates) if options.templates else None),
        label_file=label_file,
        index=options.index,
        batch_size=options.img_batch_size,
        num_workers=options.num_workers,
        say=say,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--save-dir {options.save_dir}: cannot be made ({error.strerror}); name another one"
        ) from error
    zeroshot.write_probabilities(
        path,
        found.probabilities_NC,
        options.chosen.model,
        options.chosen.vision,
        dataset=options.dataset,
        num_parameters=found.num_parameters,
    )
    _report(say, found.accuracy, labels, path)
    return found.accuracy


def _report(say: command.Speaker, result: "Accuracy", labels: list[str], path: Path) -> None:
    say(f"Result:\nzeroshot-top1: {result.top1}")
    if result.top5 is not None:
        say(f"zeroshot-top5: {result.top5}")
    per_class = list(zip(labels, result.per_class, strict=True))  # a label may come twice: no dictionary
    tested = sorted((share, label) for label, share in per_class if share is not None)
    more = both(
        f"（{len(tested)} 类中的 {MOST_CLASSES_SHOWN} 类；--json 列出全部）",
        f" ({MOST_CLASSES_SHOWN} of {len(tested)}; --json has all)",
    )
    more = more if len(tested) > MOST_CLASSES_SHOWN else ""
    say(both(f"各类准确率，从最差的开始{more}：", f"Per class, worst first{more}:"))
    for share, label in tested[:MOST_CLASSES_SHOWN]:
        say(f"  {share:.4f} {label}")
    say(f"Probabilities are saved in {path}")
    say("Finished.")
    top = {"zeroshot-top1": result.top1, "zeroshot-top5": result.top5}
    shares = [{"label": label, "accuracy": share} for label, share in per_class]
    say.result({**top, "per_class": shares, "predictions": str(path)})


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese", num_workers=4)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run_command, Options, args)


if __name__ == "__main__":
    main()
