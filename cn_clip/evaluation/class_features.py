"""Features of labelled pictures: those of one folder a class, computed once and kept in an npz; evaluation, probing."""

# N pictures, D embedding

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import __version__
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.opening import Identity
from cn_clip.command import Speaker
from cn_clip.data.pictures import ClassFolders
from cn_clip.data.records import digest_of
from cn_clip.errors import DataError
from cn_clip.features.extraction import compute_pictures
from cn_clip.features.rows import FloatArray, first_not_finite
from cn_clip.features.store import Job, RowStore, job_text
from cn_clip.features.tables import read_arrays
from cn_clip.files import atomic_write

SUFFIX = ".npz"

# Of a file that does not name them: a label of a damaged one may be any number.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class ClassFeatures:
    """Rows (N, D) float32, the class number of each (N,), and the names of the classes by number."""

    rows_ND: FloatArray
    labels_N: NDArray[np.int64]
    classes: tuple[str, ...]


def of_folder(
    folder: str | os.PathLike[str],
    file: Path,
    encoder: Encoder,
    identity: Identity,
    say: Speaker,
    *,
    batch_size: int,
    num_workers: int,
) -> ClassFeatures:
    """The features of the pictures of class folders, from `file` if it is of these pictures and this model.

    Otherwise they are computed and written there; a killed run goes on where it stopped.
    Raises DataError for a missing folder, one without pictures, a picture that cannot be read and a file that cannot be
    written, CheckpointError for a model that gives no numbers.
    """
    pictures = ClassFolders(folder)
    job = _job(pictures, encoder, identity, batch_size)
    if file.is_file():
        arrays = _load(file)
        if "job" not in arrays:
            raise DataError("holds features that this command did not write; move it away", at=file)
        if str(arrays["job"]) == job_text(job):
            say(f"{file}: 特征已有，不再计算 / the features are there")
            return _checked(file, arrays)
        say.note(f"{file}: 图片、模型或设置变了，重新计算 / of other pictures, model or settings; computing again")
    with RowStore(file, job, encoder.embed_dim, say.note) as store:
        with store.computing():
            paths = [path for path, _ in pictures.samples]
            compute_pictures(pictures, encoder, store, ids=paths, batch_size=batch_size, num_workers=num_workers)
        labels_N = np.array([label for _, label in pictures.samples], dtype=np.int64)
        found = ClassFeatures(np.array(store.rows()), labels_N, tuple(pictures.classes))
        with atomic_write(file, "wb") as stream:
            np.savez(stream, features=found.rows_ND, labels=labels_N, classes=found.classes, job=job_text(job))
        store.is_written = True
    return found


def _job(pictures: ClassFolders, encoder: Encoder, identity: Identity, batch_size: int) -> Job:
    states = []
    for path, _ in pictures.samples:
        try:
            status = os.stat(path)
        except OSError as error:  # a link that leads nowhere
            raise DataError(f"cannot be read ({error.strerror})", at=path) from error
        states.append((path, status.st_size, status.st_mtime_ns))
    facts = {"data": digest_of(states), "batch_size": batch_size, "decode": encoder.decode, "version": __version__}
    return {**facts, **identity("image")}


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
