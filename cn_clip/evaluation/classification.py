"""Classification of pictures in class folders: their features, computed once and kept, and zero-shot benchmarks."""

# N pictures, C classes, D embedding

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import __version__
from cn_clip.clip import scoring
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.opening import Identity, identity, open_encoder
from cn_clip.clip.templates import load_templates, read_labels
from cn_clip.command import Speaker
from cn_clip.data.pictures import ClassFolders
from cn_clip.data.records import digest_of
from cn_clip.errors import DataError
from cn_clip.evaluation import zeroshot
from cn_clip.evaluation.benchmark_sets import ClassName, Metric, class_names, classification_sets
from cn_clip.features.extraction import compute_pictures, picture_rows
from cn_clip.features.rows import FloatArray, first_not_finite
from cn_clip.features.store import Job, RowStore, job_text
from cn_clip.features.tables import read_arrays
from cn_clip.files import atomic_write
from cn_clip.language import both
from cn_clip.progress import progress

# Of a file that does not name them: a label of a damaged one may be any number.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class ClassFeatures:
    """Rows (N, D) float32, the class number of each (N,), and the names of the classes by number."""

    rows_ND: FloatArray
    labels_N: NDArray[np.int64]
    classes: tuple[str, ...]


def of_folder(
    pictures: ClassFolders,
    file: Path,
    encoder: Encoder,
    identity: Identity,
    say: Speaker,
    *,
    batch_size: int,
    num_workers: int | None,
) -> ClassFeatures:
    """The features of the pictures of class folders, from `file` if it is of these pictures and this model.

    Otherwise they are computed and written there; a killed run goes on where it stopped.
    Raises DataError for a picture that cannot be read and a file that cannot be written, CheckpointError for a model
    that gives no numbers.
    """
    paths, states = [path for path, _ in pictures.samples], []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:  # a link that leads nowhere
            raise DataError(f"cannot be read ({error.strerror})", at=path) from error
        states.append((path, status.st_size, status.st_mtime_ns))
    facts = {"data": digest_of(states), "batch_size": batch_size, "decode": encoder.decode, "version": __version__}
    job: Job = {**facts, **identity("image")}
    if file.is_file():
        arrays = _load(file)
        if "job" not in arrays:
            raise DataError("holds features that this command did not write; move it away", at=file)
        if str(arrays["job"]) == job_text(job):
            say(both(f"{file}: 特征已有，不再计算", f"{file}: features are there already; not computed again"))
            return _checked(file, arrays)
        say.note(
            both(
                f"{file}: 图片、模型或设置变了，重新计算",
                f"{file}: made with other pictures, another model or other settings; computing again",
            )
        )
    with RowStore(file, job, encoder.embed_dim, say.note) as store:
        with store.computing():
            compute_pictures(pictures, encoder, store, ids=paths, batch_size=batch_size, num_workers=num_workers)
        labels_N = np.array([label for _, label in pictures.samples], dtype=np.int64)
        found = ClassFeatures(np.array(store.rows()), labels_N, tuple(pictures.classes))
        with atomic_write(file, "wb") as stream:
            np.savez(stream, features=found.rows_ND, labels=labels_N, classes=found.classes, job=job_text(job))
        store.is_written = True
    return found


def read(file: Path) -> ClassFeatures:
    """Labelled features of an npz: `features` (N, D), `labels` (N,) integers from 0, perhaps `classes`, their names.

    Raises DataError naming the file for anything else.
    """
    return _checked(file, _load(file))


def _load(file: Path) -> dict[str, NDArray[Any]]:
    return read_arrays(file, step="compute the features again")[0]


def _checked(file: Path, arrays: dict[str, NDArray[Any]]) -> ClassFeatures:
    if "features" not in arrays or "labels" not in arrays:
        raise DataError(f"expected the arrays features and labels, it has {sorted(arrays)}", at=file)
    rows, labels = arrays["features"], arrays["labels"]
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not rows.size:
        raise DataError(f"expected features (N, D) and one label a row, got {rows.shape} and {labels.shape}", at=file)
    if rows.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise DataError(
            f"expected features of floats and labels of integers, got {rows.dtype}, {labels.dtype}", at=file
        )
    faulty = first_not_finite(rows.astype(np.float32))
    if faulty is not None:
        raise DataError(f"row {faulty + 1} holds NaN or infinity; compute the features again", at=file)
    names = arrays.get("classes", np.arange(min(int(labels.max()) + 1, MOST_CLASSES)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(f"expected labels from 0 to {len(names) - 1}, got {labels.min()} to {labels.max()}", at=file)
    return ClassFeatures(rows.astype(np.float32), labels.astype(np.int64), tuple(map(str, names.tolist())))


def kept_features(
    sources: Sequence[tuple[Path, Path]], chosen: Choice, say: Speaker, *, batch_size: int, num_workers: int | None
) -> list[ClassFeatures]:
    """The features of several sources: class folders, each with the file that keeps its features, or files of features.

    Without a folder no model is opened. Raises as `ClassFolders`, `of_folder` and `read`.
    """
    encoder: Encoder | None = None
    if any(source.is_dir() for source, _ in sources):
        encoder = open_encoder(chosen, say.muted(), kinds=["image"])
    found = []
    for source, file in sources:
        if encoder is None or not source.is_dir():
            found.append(read(source))
            continue
        say(both(f"图片特征：{source} → {file}", f"image features: {source} → {file}"))
        sizes: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        found.append(of_folder(ClassFolders(source), file, encoder, identity(chosen, encoder), say, **sizes))
    return found


# --- zero-shot classification of a folder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Classified:
    """Probabilities (N, C) of the pictures, accuracy, and the parameters of the model, all and of its picture tower."""

    probabilities_NC: Rows
    accuracy: zeroshot.Accuracy
    num_parameters: tuple[int, int]


def classify(
    chosen: Choice,
    folder: str,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    label_file: str,
    index: str,
    batch_size: int,
    num_workers: int | None,
    say: Speaker,
) -> Classified:
    """Classifies the pictures of class folders by the labels of a file; `say` prints what Chinese-CLIP prints.

    index: the file of ELEVATER's order, into which the probabilities are put; "" for none. Raises CnClipError when
    labels, folders or checkpoint do not fit together.
    """
    encoder = open_encoder(chosen, say)
    say("Preparing zeroshot dataset.")
    pictures = ClassFolders(folder)
    numbers = zeroshot.numbers_of_labels(folder, pictures.classes, label_file, len(labels))
    order = zeroshot.read_index(Path(index), len(pictures)) if index else None
    say("Building zero-shot classifier")
    classes_CD = scoring.classifier(encoder, labels, templates)
    say("Using classifier")
    rows, paths = [], [path for path, _ in pictures.samples]
    with progress(len(pictures), both("张", "pictures"), both("分类图片", "classifying")) as bar:
        for rows_BD in picture_rows(pictures, encoder, names=paths, batch_size=batch_size, num_workers=num_workers):
            rows.append(rows_BD)
            bar.advance(len(rows_BD))
    probabilities_NC = scoring.probabilities(np.concatenate(rows), classes_CD)
    accuracy = zeroshot.accuracy(probabilities_NC, np.array([numbers[label] for _, label in pictures.samples]))
    if order is not None:
        say("Use index to rearrange the logits...")
        probabilities_NC = probabilities_NC[order]
    return Classified(probabilities_NC, accuracy, encoder.facts.num_parameters)


# --- benchmarks -------------------------------------------------------------------------------------------------------

LABEL_FILE, INDEX_FILE = "label_cn.txt", "index.json"


@dataclass(frozen=True)
class Dataset:
    """The test pictures in their class folders, the labels, which of them each folder belongs to, ELEVATER's order."""

    folder: Path
    name: str
    pictures: ClassFolders
    labels: Sequence[str]
    numbers: Sequence[int]
    order: Sequence[int] | None


@dataclass(frozen=True)
class Measured:
    """Measures in percent, how many pictures, and the file of probabilities in ELEVATER's form."""

    measures: Mapping[Metric, float]
    num_pictures: int
    own_labels: bool
    predictions: Path


def read_dataset(folder: Path, name: str) -> Dataset:
    """The labels are those of `label_cn.txt`, else this package's own; raises DataError naming what is missing."""
    if not folder.is_dir():
        raise DataError("no such folder; expected the folder of the dataset, with test/ in it", at=folder)
    part = classification_sets()[name].folder
    test = folder / part
    if not test.is_dir():
        raise DataError(
            f"{part}/ is missing; expected one folder of pictures a class in it, {part}/000 and so on", at=folder
        )
    pictures = ClassFolders(test)
    if (folder / LABEL_FILE).is_file():
        labels = read_labels(folder / LABEL_FILE)
        numbers = zeroshot.class_numbers(pictures.classes, len(labels), at=test)
    else:
        names = class_names(name)
        labels = [one.chinese for one in names]
        by_number = classification_sets()[name].is_numbered
        numbers = own_numbers(pictures.classes, names, by_number=by_number, at=test)
    index = folder / INDEX_FILE
    order = zeroshot.read_index(index, len(pictures)) if index.is_file() else None
    return Dataset(folder, name, pictures, labels, numbers, order)


def own_numbers(
    folders: Sequence[str], names: Sequence[ClassName], *, by_number: bool = True, at: object = None
) -> list[int]:
    """The class of each folder, which has its name in the dataset (ignoring case, blanks, `_` and `-`) or its number.

    by_number: whether the numbers of the dataset's folders are known to be those of `names`; if not they are refused.
    Raises DataError, about `at`, for a folder that is neither: an order by which others belong to classes cannot be
    guessed.
    """
    by_name = {_plain(one.original): number for number, one in enumerate(names)}
    are_numbers = by_number and all(folder.isascii() and folder.isdigit() for folder in folders)
    numbered = f"numbers from 0 to {len(names) - 1}, " if by_number else ""
    numbers = [int(folder) if are_numbers else by_name.get(_plain(folder), -1) for folder in folders]
    for folder, number in zip(folders, numbers, strict=True):
        if not 0 <= number < len(names):
            raise DataError(
                f"the folder {folder!r} is no class of the {len(names)}; expected {numbered}"
                f"names such as {names[0].original!r}, or your own {LABEL_FILE} beside test/",
                at=at,
            )
    if len(set(numbers)) < len(numbers):
        raise DataError(f"two folders are of one class; expected one folder a class, got {', '.join(folders)}", at=at)
    return numbers


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def benchmark(
    dataset: Dataset, chosen: Choice, output: Path, say: Speaker, *, batch_size: int, num_workers: int | None
) -> Measured:
    """Classifies the test pictures, zero-shot, with the templates of the benchmark.

    `output` exists and receives the features, which another run with the same pictures and model takes as they are, and
    the probabilities. Raises CnClipError naming a picture that cannot be read.
    """
    name, encoder = dataset.name, open_encoder(chosen, say.muted())
    say(both("提取图片特征……", "extracting image features…"))
    found = of_folder(
        dataset.pictures,
        output / "test_features.npz",
        encoder,
        identity(chosen, encoder),
        say,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    say(both("零样本分类……", "zero-shot classification…"))
    classes_CD = scoring.classifier(encoder, dataset.labels, load_templates(name), batch_size=batch_size)
    probabilities_NC = scoring.probabilities(found.rows_ND, classes_CD)
    targets_N = np.array(dataset.numbers)[found.labels_N]
    accuracy = zeroshot.accuracy(probabilities_NC, targets_N)
    measures: dict[Metric, float] = {"top1": accuracy.top1, "mean_per_class": accuracy.mean_per_class}
    if classification_sets()[name].elevater_metric == "map_11_point":
        measures["map_11_point"] = _mean_average_precision(dataset.pictures, probabilities_NC, targets_N)
    ordered_NC = probabilities_NC if dataset.order is None else probabilities_NC[list(dataset.order)]
    path, num_parameters = output / f"{name}.json", encoder.facts.num_parameters
    zeroshot.write_probabilities(
        path, ordered_NC, chosen.model, chosen.vision, dataset=name, num_parameters=num_parameters
    )
    percent = {metric: 100 * share for metric, share in measures.items()}
    own_labels = not (dataset.folder / LABEL_FILE).is_file()
    return Measured(percent, len(dataset.pictures), own_labels=own_labels, predictions=path)


def _mean_average_precision(pictures: ClassFolders, probabilities_NC: Rows, targets_N: NDArray[np.int64]) -> float:
    """The mean over the classes; a picture that lies in several class folders is one with several labels."""
    digests = [hashlib.blake2b(pictures[n].data, digest_size=16).digest() for n in range(len(pictures))]
    first: dict[bytes, int] = {}
    owner_N = np.array([first.setdefault(digest, n) for n, digest in enumerate(digests)])
    relevant_NC = np.zeros(probabilities_NC.shape, dtype=np.bool_)
    relevant_NC[owner_N, targets_N] = True
    kept_M = np.unique(owner_N)
    tested = [number for number in range(probabilities_NC.shape[1]) if relevant_NC[:, number].any()]
    precision = zeroshot.average_precision_11_point
    return float(np.mean([precision(probabilities_NC[kept_M, c], relevant_NC[kept_M, c]) for c in tested]))
