"""Classifies pictures by Chinese labels, zero-shot: `python cn_clip/eval/zeroshot_evaluation.py --datapath=… …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, drop_in, settings
from cn_clip.clip import choice
from cn_clip.errors import ConfigError, DataError
from cn_clip.option_types import (
    BatchSize,
    ContextLength,
    Json,
    NumWorkers,
    Templates,
)
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cn_clip.clip.backends.base import Rows
    from cn_clip.clip.encoder import Encoder
    from cn_clip.data.pictures import ClassFolders
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
    num_workers: NumWorkers = 4
    decode: choice.Decoding = "exact"
    templates: Templates = None
    json: Json = False

    ADDED = ("num_threads", "templates")  # see `command.spelled_out`

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
    """Evaluates, tells `say` about it, writes the ELEVATER file and returns the accuracy."""
    import numpy as np

    from cn_clip.clip.opening import open_encoder
    from cn_clip.data.pictures import ClassFolders
    from cn_clip.evaluation import elevater, zeroshot
    from cn_clip.evaluation.templates import load_templates, read_labels
    from cn_clip.features.rows import check_finite

    say.params(options)
    _check_output(options)
    labels = read_labels(Path(options.label_file or ""))
    templates = load_templates(options.dataset, Path(options.templates) if options.templates else None)
    encoder = open_encoder(options.chosen, say)
    say("Preparing zeroshot dataset.")
    dataset = ClassFolders(options.datapath)
    numbers = _class_numbers(options, dataset.classes, len(labels))
    order = elevater.read_index(Path(options.index), len(dataset)) if options.index else None
    say("Building zero-shot classifier")
    classes_CD = zeroshot.classifier(encoder, labels, templates)
    check_finite(classes_CD, labels, "label")
    say("Using classifier")
    images_ND, folders_N = _picture_features(options, encoder, dataset)
    probabilities_NC = zeroshot.probabilities(images_ND, classes_CD)
    result = zeroshot.accuracy(probabilities_NC, np.array(numbers)[folders_N])
    if order is not None:
        say("Use index to rearrange the logits...")
        probabilities_NC = probabilities_NC[order]
    path = options.output_file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--save-dir {options.save_dir}: cannot be made ({error.strerror}); name another one"
        ) from error
    elevater.write(
        path,
        probabilities_NC,
        options.chosen.model,
        options.vision_model,
        dataset=options.dataset,
        num_parameters=encoder.facts.num_parameters,
    )
    _report(say, result, labels, path)
    return result


def _check_output(options: Options) -> None:
    """Raises CnClipError where the ELEVATER file could not be written, before any work."""
    from cn_clip.files import refuse_inputs, replaceable

    refuse_inputs("--save-dir: the file", options.output_file, [options.label_file, options.index, options.templates])
    folder = options.output_file.parent
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise DataError(f"--save-dir {options.save_dir}: {place} is no folder; name another one")
    if folder.exists():
        replaceable(options.output_file)


def _picture_features(
    options: Options, encoder: "Encoder", dataset: "ClassFolders"
) -> "tuple[Rows, NDArray[np.int64]]":
    import numpy as np
    from tqdm import tqdm

    from cn_clip.clip.backends.base import named
    from cn_clip.data.pictures import batches
    from cn_clip.features.rows import check_finite

    rows: list[Rows] = []
    targets: list[int] = []
    with tqdm(total=len(dataset), unit="picture") as bar:
        for numbers, pixels in batches(dataset, encoder.transform, options.img_batch_size, options.num_workers):
            paths = [path for path, _ in dataset.samples[len(targets) : len(targets) + len(numbers)]]
            with named("picture", paths.__getitem__):
                rows.append(encoder.backend.encode_pixels(pixels))
            check_finite(rows[-1], paths, "picture")
            targets += numbers
            bar.update(len(numbers))
    return np.concatenate(rows), np.array(targets, dtype=np.int64)


def _class_numbers(options: Options, folders: list[str], num_labels: int) -> list[int]:
    from cn_clip.evaluation.zeroshot import class_numbers

    try:
        return class_numbers(folders, num_labels)
    except DataError as error:
        raise DataError(f"{options.datapath} and {options.label_file}: {error}") from error


def _report(say: command.Speaker, result: "Accuracy", labels: list[str], path: Path) -> None:
    say(f"Result:\nzeroshot-top1: {result.top1}")
    if result.top5 is not None:
        say(f"zeroshot-top5: {result.top5}")
    per_class = list(zip(labels, result.per_class, strict=True))  # a label may come twice: no dictionary
    tested = sorted((share, label) for label, share in per_class if share is not None)
    more = f" ({MOST_CLASSES_SHOWN} of {len(tested)}; --json has all)" if len(tested) > MOST_CLASSES_SHOWN else ""
    say(f"Per class, worst first{more}:")
    for share, label in tested[:MOST_CLASSES_SHOWN]:
        say(f"  {share:.4f} {label}")
    say(f"Probabilities are saved in {path}")
    say("Finished.")
    top = {"zeroshot-top1": result.top1, "zeroshot-top5": result.top5}
    shares = [{"label": label, "accuracy": share} for label, share in per_class]
    say.result({**top, "per_class": shares, "predictions": str(path)})


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run_command, Options, args)


if __name__ == "__main__":
    main()
