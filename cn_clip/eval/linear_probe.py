"""Trains a linear classifier on frozen picture features and tests it, on all training pictures or on a few a class.

cn-clip linear-probe --train datasets/dtd/train --test datasets/dtd/test
"""

# N rows, M of them held out, D embedding, C classes

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from cn_clip import command
from cn_clip.errors import ConfigError, DataError
from cn_clip.evaluation.model_choice import ModelChoice
from cn_clip.option_types import Json
from cn_clip.settings import Range

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.encoder import Encoder
    from cn_clip.evaluation.class_features import ClassFeatures
    from cn_clip.evaluation.logistic import Labels

HELD_OUT_SHARE = 0.2
# With one picture a class nothing can be held out to choose by; CLIP's example for its own features takes this.
C_OF_ONE_SHOT = 0.316
DEFAULT_SEEDS = (0,)
# Settings that have nothing to do where both --train and --test are features; the device is that of the fit too.
_OF_MODELS = {one.name for one in fields(ModelChoice)} - {"device"} | {"cache"}


@dataclass(frozen=True)
class Options(ModelChoice):
    """Logistic regression on the features of a model that is not trained further.

    The strength of its regularisation is chosen on a fifth of the training pictures, then all of them are fitted.
    """

    train: command.Required = None
    """Training pictures, a folder a class; or an npz with features (N, D) and labels (N,)"""
    test: command.Required = None
    """Test pictures or features, likewise; their classes are among those of --train"""
    shots: Annotated[int | None, Range(least=1)] = None
    """Train on so many pictures a class, drawn at random; default: on all"""
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    """One result for each seed, which draws the shots and the held-out part; and their mean"""
    c: float | None = None
    """Inverse strength of the L2 regularisation, as scikit-learn's C; default: chosen among 1e-6 to 1e6"""
    cache: str | None = None
    """Folder for the features; default: beside --train and --test"""
    json: Json = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "test"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: expected a folder with one sub-folder a class, or an npz of features")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds: expected different numbers from 0 on, got {list(self.seeds)}")
        if self.c is not None and not (self.c > 0 and math.isfinite(self.c)):
            raise ConfigError(f"--c: expected a number above 0, got {self.c}")
        if self.c is not None and self.shots is None and self.seeds != DEFAULT_SEEDS:
            raise ConfigError("--seeds: nothing is drawn where --c is given and --shots is not; leave --seeds out")


@dataclass(frozen=True)
class Probe:
    """The result of one seed: accuracies in percent, and the C that was chosen or given."""

    seed: int
    c: float
    num_train: int
    top1: float
    mean_per_class: float


def run(options: Options) -> None:
    """Probes and reports; raises CnClipError when folders or feature files cannot be used or do not fit."""
    say = command.Speaker(quiet=options.json)
    train, test = _features(options, say)
    test_labels_N = _matched(train, test, options)
    device = _device(options)
    probes = []
    for seed in options.seeds:
        probes.append(probe(train, test, test_labels_N, options, seed, device))
        say(_line(probes[-1]))
    summary = _summary(options, train, test, probes)
    if len(probes) > 1:
        say(
            f"{len(probes)} 次平均 / mean: top-1 {summary['top1']:.2f} ± {summary['top1_std']:.2f} %，"
            f"各类平均 / mean per class {summary['mean_per_class']:.2f} %"
        )
    say.result(summary)


def probe(
    train: "ClassFeatures",
    test: "ClassFeatures",
    test_labels_N: "Labels",
    options: Options,
    seed: int,
    device: "torch.device | None" = None,
) -> Probe:
    """One draw, one choice of C, one fit, one test. test_labels_N: in the numbers of the training classes."""
    from cn_clip.evaluation import logistic, zeroshot
    from cn_clip.evaluation.class_features import ClassFeatures

    data = train
    if options.shots is not None:
        chosen = logistic.draw_shots(train.labels_N, train.classes, options.shots, seed=seed)
        data = ClassFeatures(train.rows_ND[chosen], train.labels_N[chosen], train.classes)
    c = options.c or _chosen_c(data, seed, device)
    fitted = logistic.fit(data.rows_ND, data.labels_N, len(data.classes), c=c, device=device)
    result = zeroshot.accuracy(fitted.logits(test.rows_ND).astype(np.float32), test_labels_N)
    return Probe(seed, c, len(data.rows_ND), 100 * result.top1, 100 * result.mean_per_class)


def _chosen_c(data: "ClassFeatures", seed: int, device: "torch.device | None") -> float:
    """The C of the best accuracy on the held-out part."""
    from tqdm import tqdm

    from cn_clip.evaluation import logistic

    is_held_N = logistic.held_out(data.labels_N, share=HELD_OUT_SHARE, seed=seed)
    if not is_held_N.any():
        return C_OF_ONE_SHOT
    rows_ND, labels_N = data.rows_ND[~is_held_N], data.labels_N[~is_held_N]
    held_rows_MD, held_labels_M = data.rows_ND[is_held_N], data.labels_N[is_held_N]
    start: logistic.Classifier | None = None

    with tqdm(desc="C", unit="fit") as bar:

        def score(exponent: float) -> float:
            nonlocal start
            start = logistic.fit(rows_ND, labels_N, len(data.classes), c=10**exponent, device=device, start=start)
            bar.update(1)
            return float((start.logits(held_rows_MD).argmax(axis=1) == held_labels_M).mean())

        exponent, _ = logistic.choose(score)
    return float(10**exponent)


def _features(options: Options, say: command.Speaker) -> "tuple[ClassFeatures, ClassFeatures]":
    from cn_clip.clip import opening
    from cn_clip.evaluation import class_features

    paths = [Path(options.train or ""), Path(options.test or "")]
    for flag, path in zip(("--train", "--test"), paths, strict=True):
        if not path.exists():
            raise DataError(f"{flag} {path}: no such folder or file; expected pictures, a folder a class, or an npz")
    encoder: Encoder | None = None
    if any(path.is_dir() for path in paths):
        encoder = opening.open_encoder(options.chosen, command.Speaker(quiet=True), kinds=["image"])
    else:
        _refuse_model_settings(options)
    found = []
    for path in paths:
        if encoder is None or not path.is_dir():
            found.append(class_features.read(path))
            continue
        file, identity = _cache_file(path, options), opening.identity(options.chosen, encoder)
        say(f"图片特征 / picture features: {path} → {file}")
        sizes = {"batch_size": options.batch_size, "num_workers": options.num_workers}
        found.append(class_features.of_folder(path, file, encoder, identity, say, **sizes))
    return found[0], found[1]


def _refuse_model_settings(options: Options) -> None:
    for setting in fields(Options):
        if setting.name in _OF_MODELS and getattr(options, setting.name) != setting.default:
            flag = f"--{setting.name.replace('_', '-')}"
            raise ConfigError(f"{flag}: no model is opened, --train and --test are features already; leave it out")


def _cache_file(folder: Path, options: Options) -> Path:
    from cn_clip.data.records import digest_of

    path = folder.resolve()
    if options.cache is None:
        return path.parent / f"{path.name}.{options.file_name}.npz"
    return Path(options.cache) / f"{path.name}-{digest_of([str(path)])}.{options.file_name}.npz"


def _matched(train: "ClassFeatures", test: "ClassFeatures", options: Options) -> "Labels":
    """The test labels in the numbers of the training classes of the same names."""
    wide, other = train.rows_ND.shape[1], test.rows_ND.shape[1]
    if wide != other:
        raise DataError(f"{options.train} has features of {wide} numbers, {options.test} of {other}; use one model")
    if len(np.unique(train.labels_N)) < 2:
        raise DataError("expected two classes or more to tell apart, got one", at=options.train)
    number_of = {name: number for number, name in enumerate(train.classes)}
    for label in np.unique(test.labels_N).tolist():
        if test.classes[label] not in number_of:
            raise DataError(
                f"the class {test.classes[label]!r} is not among those of {options.train}; "
                "name the folders of a class alike",
                at=options.test,
            )
    numbers = np.array([number_of.get(name, -1) for name in test.classes], dtype=np.int64)
    return numbers[test.labels_N]


def _device(options: Options) -> "torch.device":
    """Where to fit: the processor in place of a device without float64."""
    import torch

    from cn_clip.ranks import choose_device

    device = choose_device(options.device)
    return torch.device("cpu") if device.type == "mps" else device


def _line(one: Probe) -> str:
    return (
        f"seed {one.seed}: top-1 {one.top1:.2f} %，各类平均 / mean per class {one.mean_per_class:.2f} %，"
        f"C = {one.c:.3g}，{one.num_train} 张训练图片 / training pictures"
    )


def _summary(
    options: Options, train: "ClassFeatures", test: "ClassFeatures", probes: Sequence[Probe]
) -> dict[str, Any]:
    top1 = [one.top1 for one in probes]
    sizes = {"num_classes": len(train.classes), "num_test": len(test.rows_ND), "embed_dim": train.rows_ND.shape[1]}
    means = {"top1": float(np.mean(top1)), "top1_std": float(np.std(top1))}
    means["mean_per_class"] = float(np.mean([one.mean_per_class for one in probes]))
    settings = {"train": options.train, "test": options.test, "shots": options.shots}
    return {**settings, **sizes, **means, "runs": [asdict(one) for one in probes]}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
