"""Zero-shot classification as pure functions: class folders and labels, accuracy, average precision; ELEVATER's files.

Class vectors and probabilities are made in `clip.scoring`.
"""

# N pictures, C classes, D embedding, K cuts of a ranking

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends.base import Rows
from cn_clip.clip.families.names import is_foreign
from cn_clip.errors import DataError
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps

_RECALL_LEVELS = 11


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


def class_numbers(folders: Sequence[str], num_labels: int, *, at: object = None) -> list[int]:
    """The line (from 0) of the label file that each class folder, given in sorted order, belongs to.

    Folders named by the label's number (`7`, `007`) belong to it, also when some numbers have no folder. Folders of
    other names belong to the labels by their order, as many folders as labels. Raises DataError, about `at`, when
    neither fits, also for numbers that are not those of labels: their order as words is not that of the lines.
    """
    if not all(name.isascii() and name.isdigit() for name in folders):
        if len(folders) == num_labels:
            return list(range(num_labels))
        raise DataError(
            f"{len(folders)} class folders and {num_labels} labels; expected one folder a label, in the same order, or "
            f"folders named 000 to {num_labels - 1:03d} after their label's number",
            at=at,
        )
    bearer: dict[int, str] = {}
    for name in folders:
        number = int(name)
        if number >= num_labels or number in bearer:
            got = f"{bearer[number]!r} and {name!r}" if number in bearer else repr(name)
            raise DataError(
                f"{len(folders)} class folders and {num_labels} labels; the folders' numbers start at 0 for the first "
                f"label: expected each of 000 to {num_labels - 1:03d} once at most, got {got}; rename the folders",
                at=at,
            )
        bearer[number] = name
    return list(bearer)


def numbers_of_labels(
    folder: str | os.PathLike[str], folders: Sequence[str], labels_file: str | os.PathLike[str], num_labels: int
) -> list[int]:
    """`class_numbers` of the class folders in `folder`; raises DataError about it and the file of the labels."""
    try:
        return class_numbers(folders, num_labels)
    except DataError as error:  # of two files, so of none that programs could read from it
        raise DataError(f"{folder} and {labels_file}: {error}") from error


def accuracy(probabilities_NC: Rows, targets_N: NDArray[np.int64]) -> Accuracy:
    """Top-1, top-5 and per-class accuracy; raises DataError for a target that is not a class."""
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


def average_precision_11_point(scores_N: Rows, is_relevant_N: NDArray[np.bool_]) -> float:
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


# --- files of the ELEVATER benchmark ----------------------------------------------------------------------------------


def read_index(path: Path, num_pictures: int) -> list[int]:
    """ELEVATER's order of the pictures; raises DataError for anything but a JSON list of all numbers, each once."""
    try:
        order = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); expected a JSON list of picture numbers", at=path) from error
    if not isinstance(order, list):
        raise DataError(f"holds a {type(order).__name__}; expected a JSON list of picture numbers", at=path)
    for number in order:
        if type(number) is not int or not 0 <= number < num_pictures:
            raise DataError(f"expected picture numbers from 0 to {num_pictures - 1}, got {number!r}", at=path)
    if len(order) != num_pictures or len(set(order)) != num_pictures:
        raise DataError(
            f"expected each of the numbers of {num_pictures} pictures once, got {len(order)} numbers, "
            f"{len(set(order))} different ones; is it the index of this dataset?",
            at=path,
        )
    return order


def write_probabilities(
    path: Path,
    probabilities_NC: Rows,
    model: str,
    vision_model: str | None,
    *,
    dataset: str,
    num_parameters: tuple[int, int],
) -> None:
    """Writes the predictions of a dataset for ELEVATER's site: probabilities (1, N, C) to 6 decimals, and facts.

    model, vision_model: what was opened, and its picture tower where that was named. num_parameters: of the model, and
    of its picture tower. Raises DataError when the file cannot be written; its folder exists.
    """
    total, visual = num_parameters
    rounded = [[round(value, 6) for value in row] for row in probabilities_NC.tolist()]
    content = {
        "model_name": model if is_foreign(model) else f"CN-CLIP-{vision_model or Path(model).stem}",
        "dataset_name": dataset,
        "num_trainable_params": 0,
        "num_params": total,
        "num_visual_params": visual,
        "num_backbone_params": total,
        "n_shot": 0,
        "rnd_seeds": [123],
        "predictions": [rounded],
    }
    with atomic_write(path) as stream:
        stream.write(dumps(content))
