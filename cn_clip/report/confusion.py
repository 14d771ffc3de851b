"""Zero-shot classification of class folders: how often each class is taken for each other."""

# N pictures, C classes, D embedding

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.encoder import Encoder
from cn_clip.data.picture_sets import ClassFolders, batches
from cn_clip.errors import DataError
from cn_clip.evaluation import zeroshot
from cn_clip.evaluation.templates import read_labels
from cn_clip.features.rows import check_finite

MOST_PAIRS = 12


@dataclass(frozen=True)
class Mistake:
    """Pictures of the class `true` taken for `taken`: how many, and the one the model was surest of."""

    true: int
    taken: int
    count: int
    sample: str
    probability: float


@dataclass(frozen=True)
class Confusion:
    """counts_CC: pictures by true class (row) and class they were taken for. mistakes: the most frequent first."""

    folder: Path
    labels: list[str]
    counts_CC: NDArray[np.int64]
    accuracy: zeroshot.Accuracy
    mistakes: list[Mistake]

    @property
    def num_pictures(self) -> int:
        """Pictures classified."""
        return int(self.counts_CC.sum())


def examine(
    encoder: Encoder, folder: Path, labels_file: Path, templates: Sequence[str], *, batch_size: int, num_threads: int
) -> Confusion:
    """Classifies as `cn-clip zeroshot` does; raises DataError when folders and labels do not fit together."""
    labels = read_labels(labels_file)
    dataset = ClassFolders(folder)
    try:
        numbers = zeroshot.class_numbers(dataset.classes, len(labels))
    except DataError as error:
        raise DataError(f"{folder} and {labels_file}: {error}") from error
    classes_CD = zeroshot.classifier(encoder, labels, templates, batch_size=batch_size)
    check_finite(classes_CD, labels, "label")
    pixel_batches = batches(dataset, encoder.transform, batch_size, num_threads)
    images_ND = np.concatenate([encoder.backend.encode_pixels(pixels) for _, pixels in pixel_batches])
    paths = [path for path, _ in dataset.samples]
    check_finite(images_ND, paths, "picture")
    targets_N = np.array([numbers[label] for _, label in dataset.samples], dtype=np.int64)
    return tally(zeroshot.probabilities(images_ND, classes_CD), targets_N, labels, paths, folder)


def tally(
    probabilities_NC: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    labels: list[str],
    paths: Sequence[str],
    folder: Path,
) -> Confusion:
    """Counts what each picture was taken for: its most probable class, the first of equals."""
    accuracy = zeroshot.accuracy(probabilities_NC, targets_N)
    taken_N = probabilities_NC.argmax(axis=1)
    counts_CC = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts_CC, (targets_N, taken_N), 1)
    wrong_CC = counts_CC * ~np.eye(len(labels), dtype=bool)
    most = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_PAIRS]
    cells = [divmod(int(place), len(labels)) for place in most if wrong_CC.flat[place]]
    mistakes = [_mistake(true, taken, probabilities_NC, targets_N, taken_N, paths) for true, taken in cells]
    return Confusion(folder, labels, counts_CC, accuracy, mistakes)


def _mistake(
    true: int,
    taken: int,
    probabilities_NC: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    taken_N: NDArray[np.int64],
    paths: Sequence[str],
) -> Mistake:
    places = np.flatnonzero((targets_N == true) & (taken_N == taken))
    surest = int(places[probabilities_NC[places, taken].argmax()])
    return Mistake(true, taken, len(places), paths[surest], float(probabilities_NC[surest, taken]))


def most_confused(counts_CC: NDArray[np.int64], most: int) -> list[int]:
    """At most `most` classes in their order: those with the most mistakes, made or suffered, where there are more."""
    if len(counts_CC) <= most:
        return list(range(len(counts_CC)))
    wrong_CC = counts_CC * ~np.eye(len(counts_CC), dtype=bool)
    mistakes_C = wrong_CC.sum(axis=0) + wrong_CC.sum(axis=1)
    return sorted(np.argsort(-mistakes_C, kind="stable")[:most].tolist())
