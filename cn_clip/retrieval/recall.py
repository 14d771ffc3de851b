"""Recall at k, from ranked ids or from features; pure functions for evaluation and for validation during training."""

# N pictures, M texts, D dimensions, P relevant (picture, text) pairs, Q queries, K results a query

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cn_clip.errors import DataError
from cn_clip.retrieval.flat import top_k

if TYPE_CHECKING:
    import torch

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """For each k, the share of all queries with a relevant item among the first k found; in [0, 1]."""

    at: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over k. Added from left to right: sum() rounds otherwise from Python 3.12 on."""
        total = 0.0
        for value in self.at.values():
            total += value
        return total / len(self.at)

    def line(self) -> str:
        """`R@1: 71.20 R@5: 90.50 R@10: 95.30`, in percent."""
        return " ".join(f"R@{k}: {100 * value:.2f}" for k, value in self.at.items())


class RecallBothWays(NamedTuple):
    """Recall of pictures found by texts, and of texts found by pictures."""

    text_to_image: Recall
    image_to_text: Recall

    @property
    def mean(self) -> float:
        """The mean of both directions over k."""
        return (self.text_to_image.mean + self.image_to_text.mean) / 2

    def values(self) -> dict[str, float]:
        """One name each, for JSON: `text_to_image_r1`, ..., `text_to_image_mean_recall`, and so the other way."""
        values: dict[str, float] = {}
        for name, recall in self._asdict().items():
            values |= {f"{name}_r{k}": share for k, share in recall.at.items()}
            values[f"{name}_mean_recall"] = recall.mean
        return values


def recall_at_k(
    ranked_ids: Sequence[Sequence[Hashable]], relevant_ids: Sequence[Collection[Hashable]], *, ks: Sequence[int] = KS
) -> Recall:
    """Recall of rankings: per query the ids found, best first, and the ids that are right.

    A query without any relevant id counts as one that found nothing, as in Chinese-CLIP: it lowers the recall.
    Raises DataError without queries or with other numbers of rankings and relevant sets.
    """
    if len(ranked_ids) != len(relevant_ids):
        raise DataError(f"recall: {len(ranked_ids)} rankings, but {len(relevant_ids)} sets of relevant ids")
    first_hits = [
        next((rank for rank, found in enumerate(ranked) if found in relevant), np.inf)
        for ranked, relevant in zip(ranked_ids, map(set, relevant_ids), strict=True)
    ]
    return _recall(np.array(first_hits, dtype=np.float64), ks)


def recall_from_features(
    images_ND: NDArray[np.float32] | torch.Tensor,
    texts_MD: NDArray[np.float32] | torch.Tensor,
    pairs_P2: ArrayLike,
    *,
    ks: Sequence[int] = KS,
) -> RecallBothWays:
    """Exact recall of both directions by inner product; memory is bounded as in `flat.top_k`.

    images_ND, texts_MD: finite, unit rows for cosine similarity; tensors may be of any float type and are compared as
    float32 on their device, without gradients. pairs_P2: the relevant (picture row, text row) pairs, in any order.
    A text without a pair counts as a query that found nothing; a picture without one is no query, only something to
    find, as in the picture-to-text annotation of Chinese-CLIP. Raises DataError for a pair outside the rows, without
    pictures or texts, and without pairs.

    Ties, a worked example: a text has the products 0.7, 0.9, 0.7 with pictures 0, 1, 2. Of equal ones the smaller row
    number comes first: 1, 0, 2. If only picture 2 is relevant, its rank is 3, and R@1 = 0, R@2 = 0, R@3 = 1; if only
    picture 0 is, its rank is 2, and R@2 = 1.
    """
    images, texts = _as_rows(images_ND), _as_rows(texts_MD)
    if not len(images) or not len(texts):
        raise DataError(f"recall: {len(images)} pictures and {len(texts)} texts; expected at least one of each")
    pairs = np.asarray(pairs_P2, dtype=np.int64).reshape(-1, 2)
    if len(pairs) and (pairs.min() < 0 or (pairs.max(axis=0) >= (len(images), len(texts))).any()):
        raise DataError(f"recall: a pair lies outside the {len(images)} pictures and {len(texts)} texts")
    device = "cpu" if isinstance(images_ND, np.ndarray) else images_ND.device
    described, query = np.unique(pairs[:, 0], return_inverse=True)
    return RecallBothWays(
        text_to_image=_one_way(texts, images, pairs[:, ::-1], ks, device),
        image_to_text=_one_way(images[described], texts, np.stack([query, pairs[:, 1]], axis=1), ks, device),
    )


def _as_rows(rows: NDArray[np.float32] | torch.Tensor) -> NDArray[np.float32]:
    return rows if isinstance(rows, np.ndarray) else rows.detach().float().cpu().numpy()


def _one_way(
    queries_QD: NDArray[np.float32],
    gallery_ND: NDArray[np.float32],
    pairs: NDArray[np.int64],
    ks: Sequence[int],
    device: str | torch.device,
) -> Recall:
    found_QK = top_k(queries_QD, gallery_ND, max(ks), device=device).indices
    # One number names one (query, found row) pair.
    found_codes = np.arange(len(found_QK))[:, None] * len(gallery_ND) + found_QK
    hits_QK = np.isin(found_codes, pairs[:, 0] * len(gallery_ND) + pairs[:, 1])
    return _recall(np.where(hits_QK.any(axis=1), hits_QK.argmax(axis=1), np.inf), ks)


def _recall(first_hit_Q: NDArray[np.float64], ks: Sequence[int]) -> Recall:
    if not len(first_hit_Q):
        raise DataError("recall: no queries; expected at least one")
    return Recall({k: int((first_hit_Q < k).sum()) / len(first_hit_Q) for k in ks})
