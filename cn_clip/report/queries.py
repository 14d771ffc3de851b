"""The best, the middling and the worst text queries of a split, with what they found; and the recall of all."""

# N pictures, M texts, D embedding, K results

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends.base import Rows
from cn_clip.clip.encoder import Encoder
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, is_split_folder
from cn_clip.data.picture_sets import LmdbPictures, batches
from cn_clip.data.splits import Split, read_split
from cn_clip.errors import DataError
from cn_clip.retrieval.flat import top_k
from cn_clip.retrieval.recall import RecallBothWays, recall_from_features

_SCORES_IN_FLIGHT = 1 << 22
GROUP_SIZE = 8


class Hit(NamedTuple):
    """A picture found: its number in the split, its cosine, and whether it belongs to the query."""

    image: int
    score: float
    is_right: bool


@dataclass(frozen=True)
class Query:
    """A text and what it found, best first. right: its own picture of the highest score, `rank` its place from 1."""

    text: str
    rank: int
    right: Hit
    hits: list[Hit]


@dataclass(frozen=True)
class Retrieval:
    """Recall over a whole split, the rank of the right picture of every text, and some of its queries."""

    folder: Path
    num_images: int
    num_texts: int
    recall: RecallBothWays
    ranks_M: NDArray[np.int64]
    best: list[Query]
    median: list[Query]
    worst: list[Query]
    pictures: LmdbPictures


def examine(
    encoder: Encoder, folder: Path, *, k: int, batch_size: int, num_threads: int, group_size: int = GROUP_SIZE
) -> Retrieval:
    """Computes every picture and text of a built split and ranks them.

    The queries are ordered by the rank of their right picture, and of equal ranks by how far its score lies above
    (or least below) that of the best wrong picture. Raises DataError for a folder that is no split.
    """
    if not is_split_folder(folder):
        raise DataError(f"no built split is here; expected the folders {IMAGES} and {PAIRS} in it (--data)", at=folder)
    pictures = LmdbPictures(folder / IMAGES)
    split = read_split(PairStore(folder / PAIRS), pictures.ids)
    pixel_batches = batches(pictures, encoder.transform, batch_size, num_threads)
    images_ND = np.concatenate([encoder.backend.encode_pixels(pixels) for _, pixels in pixel_batches])
    texts_MD = encoder.encode_texts(split.texts, batch_size=batch_size)
    recall = recall_from_features(images_ND, texts_MD, split.pairs)
    ranking = rank_all(images_ND, texts_MD, split.pairs)
    groups = choose(first_of_each(ranking.order_M, split.texts), group_size)
    best, median, worst = (_queries(chosen, split, images_ND, texts_MD, ranking, k) for chosen in groups)
    sizes = (len(images_ND), len(texts_MD))
    return Retrieval(folder, *sizes, recall, ranking.ranks_M, best, median, worst, pictures)


class Ranking(NamedTuple):
    """For every text: the place of its first right picture from 1, its number and score; texts in order of success."""

    ranks_M: NDArray[np.int64]
    right_M: NDArray[np.int64]
    scores_M: NDArray[np.float32]
    order_M: NDArray[np.int64]


def rank_all(images_ND: Rows, texts_MD: Rows, pairs: Sequence[tuple[int, int]]) -> Ranking:
    """Ranks as `flat.top_k` would give them for all N pictures: by falling cosine, equal ones in their order.

    pairs: (picture, text); every text has at least one. Memory is bounded by blocks of texts.
    """
    right_of: dict[int, list[int]] = defaultdict(list)
    for image, text in pairs:
        right_of[text].append(image)
    num_texts = len(texts_MD)
    ranks_M, right_M = np.empty(num_texts, dtype=np.int64), np.empty(num_texts, dtype=np.int64)
    scores_M, margins_M = np.empty(num_texts, dtype=np.float32), np.empty(num_texts, dtype=np.float32)
    step = max(1, _SCORES_IN_FLIGHT // max(len(images_ND), 1))
    gallery_DN = images_ND.astype(np.float64).T
    for start in range(0, num_texts, step):
        block = (texts_MD[start : start + step].astype(np.float64) @ gallery_DN).astype(np.float32)
        for text, scores_N in enumerate(block, start):
            own = np.array(sorted(set(right_of[text])))
            right = own[scores_N[own].argmax()]
            score = scores_N[right]
            before = np.count_nonzero(scores_N > score) + np.count_nonzero(scores_N[:right] == score)
            right_M[text], scores_M[text], ranks_M[text] = right, score, before + 1
            scores_N[own] = -np.inf
            margins_M[text] = score - scores_N.max(initial=-1.0)
    return Ranking(ranks_M, right_M, scores_M, np.lexsort((-margins_M, ranks_M)))


def first_of_each(order_M: NDArray[np.int64], texts: Sequence[str]) -> list[int]:
    """The numbers of the texts in their order, of texts in the same words only the first."""
    numbers: dict[str, int] = {}
    for number in order_M.tolist():
        numbers.setdefault(texts[number], number)
    return list(numbers.values())


def choose(order: list[int], group_size: int) -> tuple[list[int], list[int], list[int]]:
    """(best first, from the middle, worst first) of texts in order of success: no text twice, the best served first."""
    size = min(group_size, max(1, len(order) // 3))
    best, rest = order[:size], order[size:]
    worst, rest = rest[-size:][::-1], rest[: max(0, len(rest) - size)]
    begin = max(0, (len(rest) - size) // 2)
    return best, rest[begin : begin + size], worst


def _queries(chosen: list[int], split: Split, images_ND: Rows, texts_MD: Rows, ranking: Ranking, k: int) -> list[Query]:
    if not chosen:
        return []
    own = defaultdict(set)
    for image, text in split.pairs:
        own[text].add(image)
    matches = top_k(texts_MD[chosen], images_ND, k)
    queries = []
    for text, indices, scores in zip(chosen, matches.indices.tolist(), matches.scores.tolist(), strict=True):
        hits = [Hit(image, score, image in own[text]) for image, score in zip(indices, scores, strict=True)]
        right = Hit(int(ranking.right_M[text]), float(ranking.scores_M[text]), True)
        queries.append(Query(split.texts[text], int(ranking.ranks_M[text]), right, hits))
    return queries
