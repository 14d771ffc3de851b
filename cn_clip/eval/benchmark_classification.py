"""Runs a zero-shot classification benchmark by the functions of that command; `evaluate` calls it."""

# N pictures, C classes, K cuts of a ranking

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cn_clip.command import Speaker
from cn_clip.errors import DataError
from cn_clip.evaluation.benchmark_sets import ClassName, Metric, class_names, classification_sets
from cn_clip.evaluation.model_choice import ModelChoice

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Rows
    from cn_clip.data.pictures import ClassFolders

LABEL_FILE, INDEX_FILE = "label_cn.txt", "index.json"
_RECALL_LEVELS = 11


@dataclass(frozen=True)
class Classified:
    """Measures in percent, how many pictures, and the file of probabilities in ELEVATER's form."""

    measured: Mapping[Metric, float]
    num_pictures: int
    own_labels: bool
    predictions: Path


@dataclass(frozen=True)
class Dataset:
    """The test pictures in their class folders, the labels, which of them each folder belongs to, ELEVATER's order."""

    folder: Path
    name: str
    pictures: "ClassFolders"
    labels: Sequence[str]
    numbers: Sequence[int]
    order: Sequence[int] | None


def read_dataset(folder: Path, name: str) -> Dataset:
    """The labels are those of `label_cn.txt`, else this package's own; raises DataError naming what is missing."""
    pictures = _test_pictures(folder)
    labels, numbers = _labels(folder, name, pictures.classes)
    return Dataset(folder, name, pictures, labels, numbers, _order(folder, len(pictures)))


def measure(dataset: Dataset, options: ModelChoice, output: Path, say: Speaker) -> Classified:
    """Classifies the test pictures, zero-shot, with the templates of the benchmark.

    `output` exists and receives the features, which another run with the same pictures and model takes as they are, and
    the probabilities. Raises CnClipError naming a picture that cannot be read.
    """
    from cn_clip.clip import opening
    from cn_clip.evaluation import class_features, elevater, zeroshot
    from cn_clip.evaluation.templates import load_templates
    from cn_clip.features.rows import check_finite

    data, name, pictures, labels = dataset.folder, dataset.name, dataset.pictures, dataset.labels
    encoder = opening.open_encoder(options.chosen, Speaker(quiet=True))
    say("提取图片特征 / extracting picture features…")
    found = class_features.of_folder(
        data / "test",
        output / "test_features.npz",
        encoder,
        opening.identity(options.chosen, encoder),
        say,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    say("零样本分类 / zero-shot classification…")
    classes_CD = zeroshot.classifier(encoder, labels, load_templates(name), batch_size=options.batch_size)
    check_finite(classes_CD, labels, "label")
    probabilities_NC = zeroshot.probabilities(found.rows_ND, classes_CD)
    targets_N = np.array(dataset.numbers)[found.labels_N]
    accuracy = zeroshot.accuracy(probabilities_NC, targets_N)
    measured: dict[Metric, float] = {"top1": accuracy.top1, "mean_per_class": accuracy.mean_per_class}
    if _is_multi_label(name):
        measured["map_11_point"] = _mean_average_precision(pictures, probabilities_NC, targets_N)
    ordered_NC = probabilities_NC if dataset.order is None else probabilities_NC[list(dataset.order)]
    path = output / f"{name}.json"
    model, num_parameters = options.chosen, encoder.facts.num_parameters
    elevater.write(path, ordered_NC, model.model, model.vision, dataset=name, num_parameters=num_parameters)
    percent = {metric: 100 * share for metric, share in measured.items()}
    return Classified(percent, len(pictures), own_labels=not (data / LABEL_FILE).is_file(), predictions=path)


def average_precision_11_point(scores_N: "Rows", is_relevant_N: NDArray[np.bool_]) -> float:
    """PASCAL VOC 2007's average precision in [0, 1]: the mean over the recalls 0, 0.1 … 1 of the best precision there.

    The best precision at a recall is that of any cut that reaches it. Equal scores are never cut apart.
    Raises ValueError without a relevant item. Source: Everingham et al., IJCV 2010, section 4.2.
    """
    if not is_relevant_N.any():
        raise ValueError("expected at least one relevant item")
    order_N = np.argsort(-scores_N, kind="stable")
    last_K = np.append(np.flatnonzero(np.diff(scores_N[order_N])), len(order_N) - 1)
    hits_K = np.cumsum(is_relevant_N[order_N])[last_K]
    precision_K = hits_K / (last_K + 1)
    # In integers: 3 of 10 hits reach the level 0.3 exactly.
    levels = range(_RECALL_LEVELS)
    reached = [hits_K * (_RECALL_LEVELS - 1) >= level * hits_K[-1] for level in levels]
    return float(np.mean([precision_K[cut_K].max() for cut_K in reached]))


def _is_multi_label(name: str) -> bool:
    return classification_sets()[name].elevater_metric == "map_11_point"


def _mean_average_precision(pictures: "ClassFolders", probabilities_NC: "Rows", targets_N: NDArray[np.int64]) -> float:
    """The mean over the classes; a picture that lies in several class folders is one with several labels."""
    first: dict[bytes, int] = {}
    owner_N = np.array([first.setdefault(_digest(pictures, n), n) for n in range(len(pictures))])
    relevant_NC = np.zeros(probabilities_NC.shape, dtype=np.bool_)
    relevant_NC[owner_N, targets_N] = True
    kept_M = np.unique(owner_N)
    tested = [number for number in range(probabilities_NC.shape[1]) if relevant_NC[:, number].any()]
    values = [average_precision_11_point(probabilities_NC[kept_M, c], relevant_NC[kept_M, c]) for c in tested]
    return float(np.mean(values))


def _digest(pictures: "ClassFolders", number: int) -> bytes:
    return hashlib.blake2b(pictures[number].data, digest_size=16).digest()


def _test_pictures(data: Path) -> "ClassFolders":
    from cn_clip.data.pictures import ClassFolders

    if not data.is_dir():
        raise DataError("no such folder; expected the folder of the dataset, with test/ in it", at=data)
    if not (data / "test").is_dir():
        raise DataError("test/ is missing; expected one folder of pictures a class in it, test/000 and so on", at=data)
    return ClassFolders(data / "test")


def _labels(data: Path, name: str, folders: Sequence[str]) -> tuple[list[str], list[int]]:
    """The labels, and which of them each class folder belongs to."""
    from cn_clip.evaluation import templates, zeroshot

    file = data / LABEL_FILE
    given = templates.read_labels(file) if file.is_file() else None
    try:
        if given is not None:
            return given, zeroshot.class_numbers(folders, len(given))
        names = class_names(name)
        by_number = classification_sets()[name].is_numbered
        return [one.chinese for one in names], own_numbers(folders, names, by_number=by_number)
    except DataError as error:
        raise DataError(error, at=data / "test") from error


def own_numbers(folders: Sequence[str], names: Sequence[ClassName], *, by_number: bool = True) -> list[int]:
    """The class of each folder, which bears its name in the dataset (case, blanks, `_`, `-` aside) or its number.

    by_number: whether the numbers of the dataset's folders are known to be those of `names`; if not they are no names.
    Raises DataError for a folder that is neither: an order by which others belong to classes cannot be guessed.
    """
    by_name = {_plain(one.original): number for number, one in enumerate(names)}
    are_numbers = by_number and all(folder.isascii() and folder.isdigit() for folder in folders)
    numbered = f"numbers from 0 to {len(names) - 1}, " if by_number else ""
    numbers = [int(folder) if are_numbers else by_name.get(_plain(folder), -1) for folder in folders]
    for folder, number in zip(folders, numbers, strict=True):
        if not 0 <= number < len(names):
            raise DataError(
                f"the folder {folder!r} is no class of the {len(names)}; expected {numbered}"
                f"names such as {names[0].original!r}, or your own {LABEL_FILE} beside test/"
            )
    if len(set(numbers)) < len(numbers):
        raise DataError(f"two folders are of one class; expected one folder a class, got {', '.join(folders)}")
    return numbers


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _order(data: Path, num_pictures: int) -> list[int] | None:
    from cn_clip.evaluation.elevater import read_index

    file = data / INDEX_FILE
    return read_index(file, num_pictures) if file.is_file() else None
