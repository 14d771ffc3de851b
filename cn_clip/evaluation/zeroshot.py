"""Zero-shot classification as pure functions of features: classifier, probabilities, accuracy."""

# N pictures, C classes, D embedding

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends.base import Rows, named
from cn_clip.clip.encoder import Encoder
from cn_clip.errors import DataError
from cn_clip.evaluation.templates import fill

# The scale of a fully trained logit_scale; probabilities of the ELEVATER files are made with it.
LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1]. top5 is None with fewer than 6 classes; per_class has None for a class without pictures."""

    top1: float
    top5: float | None
    per_class: list[float | None]

    @property
    def mean_per_class(self) -> float:
        """The mean over the classes that have pictures."""
        return float(np.mean([share for share in self.per_class if share is not None]))


def class_numbers(folders: Sequence[str], num_labels: int) -> list[int]:
    """The line (from 0) of the label file that each class folder, given in sorted order, belongs to.

    Folders named by the label's number (`7`, `007`) belong to it, also when some numbers have no folder. Folders of
    other names belong to the labels by their order, as many folders as labels. Raises DataError when neither fits,
    also for numbers that are not those of labels: their order as words is not that of the lines.
    """
    if all(name.isascii() and name.isdigit() for name in folders):
        return _by_number(folders, num_labels)
    if len(folders) == num_labels:
        return list(range(num_labels))
    raise DataError(
        f"{len(folders)} class folders and {num_labels} labels; expected one folder a label, in the same order, or "
        f"folders named 000 to {num_labels - 1:03d} after their label's number"
    )


def _by_number(folders: Sequence[str], num_labels: int) -> list[int]:
    bearer: dict[int, str] = {}
    for name in folders:
        number = int(name)
        if number >= num_labels or number in bearer:
            got = f"{bearer[number]!r} and {name!r}" if number in bearer else repr(name)
            raise DataError(
                f"{len(folders)} class folders and {num_labels} labels; the folders' numbers start at 0 for the first "
                f"label: expected each of 000 to {num_labels - 1:03d} once at most, got {got}; rename the folders"
            )
        bearer[number] = name
    return list(bearer)


def classifier(encoder: Encoder, labels: Sequence[str], templates: Sequence[str], *, batch_size: int = 64) -> Rows:
    """Unit class vectors (C, D): the mean over the templates of each label's unit text features."""
    texts = prompts(labels, templates)
    with named("label", lambda position: labels[position // len(templates)]):
        features = encoder.encode_texts(texts, batch_size=batch_size, progress=True)
    return class_vectors(features, len(labels))


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The text of each label in each template, the templates of a label together."""
    return [fill(template, label) for label in labels for template in templates]


def class_vectors(features: Rows, num_labels: int) -> Rows:
    """Unit class vectors (C, D) of the features of `prompts`: the mean of each label's; zeros where they cancel out."""
    means_CD = features.reshape(num_labels, len(features) // num_labels, -1).mean(axis=1)
    lengths_C1 = np.linalg.norm(means_CD, axis=1, keepdims=True)
    weights: Rows = np.divide(means_CD, lengths_C1, out=np.zeros_like(means_CD), where=lengths_C1 != 0)
    return weights


def probabilities(images_ND: Rows, classes_CD: Rows, *, scale: float = LOGIT_SCALE) -> Rows:
    """Softmax over the classes of `scale` times the cosine, (N, C)."""
    logits_NC = scale * images_ND @ classes_CD.T
    exponentials = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    shares: Rows = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares


def accuracy(probabilities_NC: Rows, targets_N: NDArray[np.int64]) -> Accuracy:
    """Top-1, top-5 and per-class accuracy; raises DataError for a target that is no class."""
    num_classes = probabilities_NC.shape[1]
    if len(targets_N) and not 0 <= targets_N.min() <= targets_N.max() < num_classes:
        raise DataError(f"class number {targets_N.max()}, but there are only {num_classes} labels")
    order_NC = np.argsort(-probabilities_NC, axis=1, kind="stable")
    right_N = order_NC[:, 0] == targets_N
    top5 = float((order_NC[:, :5] == targets_N[:, None]).any(axis=1).mean()) if num_classes > 5 else None
    per_class = [
        float(right_N[targets_N == number].mean()) if (targets_N == number).any() else None
        for number in range(num_classes)
    ]
    return Accuracy(float(right_N.mean()), top5, per_class)
