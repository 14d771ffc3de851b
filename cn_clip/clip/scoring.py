"""What is made of rows: cosines, class vectors of labels in templates, and probabilities of classes; pure functions."""

# N rows, M other rows, C classes, D embedding

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from cn_clip.clip.backends.base import Rows, named
from cn_clip.clip.templates import fill

# The scale of a fully trained logit_scale; probabilities of the ELEVATER files are made with it.
LOGIT_SCALE = 100.0


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
