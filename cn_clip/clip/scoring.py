"""What is made of rows: cosines, class vectors of labels in templates, and probabilities of classes; pure functions."""

# N rows, M other rows, C classes, D embedding

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends.base import Rows, named
from cn_clip.clip.picture_arrays import is_tensor
from cn_clip.clip.templates import DEFAULT, checked, fill, load_templates
from cn_clip.errors import DataError

if TYPE_CHECKING:
    import torch

ArraysGiven: TypeAlias = "NDArray[Any] | Sequence[Sequence[float]]"
RowsGiven: TypeAlias = "ArraysGiven | torch.Tensor"

# The scale of a fully trained logit_scale; probabilities of the ELEVATER files are made with it.
LOGIT_SCALE = 100.0
# Float32 rows whose length differs less from 1 are taken as they are: the towers' own are within 1e-6.
_UNIT = 1e-4


class Labelled(NamedTuple):
    """What pictures show: the likeliest label of each, and the probabilities (N, C) of all, float32, rows sum to 1."""

    labels: list[str]
    probabilities: Rows


class TextRows(Protocol):
    """Whatever makes rows of texts, as `Encoder` does."""

    def encode_texts(self, texts: Iterable[str], *, batch_size: int | None = None, progress: bool = False) -> Rows:
        """Unit rows (N, D), float32, in the order given."""
        ...


def classifier(
    encoder: TextRows,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int | None = 64,
    progress: bool = True,
) -> Rows:
    """Unit class vectors (C, D): the mean over the templates of each label's unit text features."""
    texts = prompts(labels, templates)
    with named("label", lambda position: labels[position // len(templates)]):
        features = encoder.encode_texts(texts, batch_size=batch_size, progress=progress)
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


def unit(rows: "RowsGiven", name: str) -> Rows:
    """Rows (N, D) of any length and type of number as unit float32 rows; those that are come back as they are.

    One vector (D) is one row. Tensors come to the host. name: for messages.
    Raises DataError for another shape, for numbers that are not real, and, naming the row, for NaN, infinity or zeros.
    """
    if is_tensor(rows):
        rows = rows.detach().float().cpu().numpy()
    values = np.atleast_2d(np.asarray(rows))
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.shape[1]:
        raise DataError(
            f"{name}: expected rows of numbers (N, D), as encode_texts and encode_images give them, got "
            f"{values.dtype} of the shape {np.shape(rows)}"
        )
    lengths_N = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    wrong = np.flatnonzero(~(np.isfinite(lengths_N) & (lengths_N > 0)))
    if len(wrong):
        what = "zeros only, which have no direction" if lengths_N[wrong[0]] == 0 else "NaN or infinity"
        raise DataError(f"{name}: row {wrong[0]} holds {what}")
    if values.dtype == np.float32 and np.abs(lengths_N - 1).max(initial=0) < _UNIT:
        return values
    scaled: Rows = (values / lengths_N[:, None]).astype(np.float32)
    return scaled


def similarity(first: "RowsGiven", second: "RowsGiven") -> "Rows | torch.Tensor":
    """Cosines (N, M) of rows (N, D) with others (M, D), float32 in [-1, 1] but for rounding.

    Where one of them is a tensor so is the result, on its device, without a copy to the host; raises as `unit`.
    """
    if is_tensor(first) or is_tensor(second):
        return _similar_tensors(first, second)
    first_ND, second_MD = unit(first, "first"), unit(second, "second")
    _check_widths(first_ND.shape[1], second_MD.shape[1])
    cosines: Rows = first_ND @ second_MD.T
    return cosines


def _similar_tensors(first: "RowsGiven", second: "RowsGiven") -> "torch.Tensor":
    import torch

    device = first.device if is_tensor(first) else second.device if is_tensor(second) else None
    rows = []
    for name, given in (("first", first), ("second", second)):
        values = given.detach().float() if is_tensor(given) else torch.from_numpy(unit(given, name))
        values = (values[None] if values.ndim == 1 else values).to(device)
        if values.ndim != 2 or not values.shape[1]:
            raise DataError(f"{name}: expected rows of numbers (N, D), got a tensor of the shape {tuple(values.shape)}")
        lengths_N1 = values.norm(dim=1, keepdim=True)
        if bool((~(lengths_N1.isfinite() & (lengths_N1 > 0))).any()):
            unit(values, name)  # which says what is wrong with which row
        rows.append(values / lengths_N1)
    _check_widths(rows[0].shape[1], rows[1].shape[1])
    cosines: torch.Tensor = rows[0] @ rows[1].T
    return cosines


def _check_widths(first: int, second: int) -> None:
    if first != second:
        raise DataError(f"second: rows of {second} dimensions, but the first have {first}; give rows of one model")


def chosen_templates(templates: "Sequence[str] | str | None") -> list[str]:
    """The templates of a classification, the general ones for None; raises as `templates.checked`."""
    if templates is None:
        return load_templates(DEFAULT)
    return checked([templates] if isinstance(templates, str) else list(templates))


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels as a list; raises DataError for none, for one that is no text or empty, and for two equal ones."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise DataError(f"labels: expected a list of labels, got {labels!r}")
    listed = list(labels)
    if not listed:
        raise DataError("labels: expected at least one, got none")
    for number, label in enumerate(listed):
        if not isinstance(label, str) or not label.strip():
            raise DataError(f"labels[{number}]: expected a word or a phrase, got {label!r}")
    if len(set(listed)) < len(listed):
        twice = next(label for number, label in enumerate(listed) if label in listed[:number])
        raise DataError(f"labels: {twice!r} is there twice; each class needs a label of its own")
    return listed
