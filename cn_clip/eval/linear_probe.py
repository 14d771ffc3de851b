"""Trains a linear classifier on frozen picture features and tests it, on all training pictures or on a few a class.

cn-clip linear-probe --train datasets/dtd/train --test datasets/dtd/test
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cn_clip import command, ranks
from cn_clip.data.records import digest_of
from cn_clip.errors import ConfigError, DataError
from cn_clip.eval.evaluate import ModelChoice
from cn_clip.language import both, counted
from cn_clip.option_types import Json
from cn_clip.settings import Range, is_given
from cn_clip.settings import flag as flag_of

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
    c: Annotated[float | None, Range(above=0)] = None
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
        if self.c is not None and self.shots is None and self.seeds != DEFAULT_SEEDS:
            raise ConfigError("--seeds: nothing is drawn where --c is given and --shots is not; leave --seeds out")

    def sources(self) -> list[Path]:
        """The training and the test pictures or features; raises DataError for one that does not exist.

        Raises ConfigError for settings of a model if both are features.
        """
        paths = [Path(self.train or ""), Path(self.test or "")]
        for flag, path in zip(("--train", "--test"), paths, strict=True):
            if not path.exists():
                raise DataError(
                    f"{flag} {path}: no such folder or file; expected pictures, a folder a class, or an npz"
                )
        if not any(path.is_dir() for path in paths):
            for setting in fields(self):
                if setting.name in _OF_MODELS and is_given(self, setting.name):
                    raise ConfigError(
                        f"{flag_of(setting.name)}: no model is opened, --train and --test are features already; "
                        "leave it out"
                    )
        return paths

    def cache_file(self, folder: Path) -> Path:
        """Where the features of class folders are kept."""
        path = folder.resolve()
        if self.cache is None:
            return path.parent / f"{path.name}.{self.file_name}.npz"
        return Path(self.cache) / f"{path.name}-{digest_of([str(path)])}.{self.file_name}.npz"


def run(options: Options) -> None:
    """Probes and reports; raises CnClipError when folders or feature files cannot be used or do not fit."""
    from cn_clip.evaluation import classification, logistic

    say = command.Speaker(quiet=options.json)
    sources = options.sources()
    sizes: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.num_workers}
    train, test = classification.kept_features(
        [(source, options.cache_file(source)) for source in sources], options.chosen, say, **sizes
    )
    test_labels_N = logistic.matched_labels(train, test, names=(options.train, options.test))
    device = ranks.choose_device(options.device)
    probes = []
    for seed in options.seeds:
        one = logistic.probe(train, test, test_labels_N, seed=seed, shots=options.shots, c=options.c, device=device)
        probes.append(one)
        say(
            both(
                f"seed {one.seed}：top-1 {one.top1:.2f} %，各类平均 {one.mean_per_class:.2f} %，"
                f"C = {one.c:.3g}，{one.num_train} 张训练图片",
                f"seed {one.seed}: top-1 {one.top1:.2f} %, mean per class {one.mean_per_class:.2f} %, "
                f"C = {one.c:.3g}, {counted(one.num_train, 'training image')}",
            )
        )
    means = logistic.mean_of(probes)
    if len(probes) > 1:
        say(
            both(
                f"{len(probes)} 次平均：top-1 {means['top1']:.2f} ± {means['top1_std']:.2f} %，"
                f"各类平均 {means['mean_per_class']:.2f} %",
                f"mean of {len(probes)}: top-1 {means['top1']:.2f} ± {means['top1_std']:.2f} %, "
                f"mean per class {means['mean_per_class']:.2f} %",
            )
        )
    counts = {"num_classes": len(train.classes), "num_test": len(test.rows_ND), "embed_dim": train.rows_ND.shape[1]}
    settings = {"train": options.train, "test": options.test, "shots": options.shots}
    say.result({**settings, **counts, **means, "runs": [asdict(one) for one in probes]})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
