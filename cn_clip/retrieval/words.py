"""Finding items by the words in them, beside their vectors: which hold the words of a query, and one ranking of both.

Chinese is not cut into words: each pair of characters counts as one, as in CJK analysers of full-text engines.
"""

# N rows, removed ones included

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cn_clip.retrieval.segments import IntArray

# What is looked at: the words read in a picture, and its caption.
WORD_FIELDS = ("text", "caption")
# Cormack, Clarke and Büttcher, Reciprocal Rank Fusion outperforms Condorcet, SIGIR 2009: the constant of their paper.
RANK_CONSTANT = 60
# Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009: the usual values.
SATURATION, LENGTH_SHARE = 1.2, 0.75
# An item must hold words of at least this share of the weight of all words of the query: 的日 is not enough of
# 海边的日落.
LEAST_SHARE = 0.5
# So many of each ranking take part.
DEPTH = 100

_RUN = re.compile(r"[a-z0-9]+|[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]+|[^\W\da-z_]+")


def words_of(text: str, *, is_query: bool = False) -> list[str]:
    """`WiFi 密码` -> wifi, 密, 码, 密码; a query of two characters or more is asked for by pairs: wifi, 密码.

    Full-width letters and digits count as the usual ones, capitals as small letters.
    """
    found = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", text).lower()):
        if run.isascii():
            found.append(run)
            continue
        pairs = [run[at : at + 2] for at in range(len(run) - 1)]
        found += pairs if is_query and pairs else [*run, *pairs]
    return found


class WordTable:
    """Which items hold which words, and how often."""

    def __init__(self, texts: Iterable[tuple[int, str]]) -> None:
        """texts: (row, text), at most one of a row."""
        self._items: dict[str, list[tuple[int, int]]] = {}
        self._lengths: dict[int, int] = {}
        for row, text in texts:
            counts = Counter(words_of(text))
            self._lengths[row] = counts.total()
            for word, count in counts.items():
                self._items.setdefault(word, []).append((row, count))
        self._mean_length = sum(self._lengths.values()) / max(len(self._lengths), 1) or 1.0

    def __len__(self) -> int:
        return len(self._lengths)

    def search(self, query: str, allowed_N: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]", limit: int) -> IntArray:
        """The rows of up to `limit` allowed items that hold words of the query, best first by BM25.

        Of the items 密码 and 会议, one holds the query 密码, which has the weight ln(1 + (2 - 1 + 0.5) / (1 + 0.5)) =
        0.69: the first holds all of it, the second nothing.
        """
        scores, shares, total = Counter[int](), Counter[int](), 0.0
        for word in set(words_of(query, is_query=True)):
            items = self._items.get(word, [])
            weight = math.log(1 + (len(self) - len(items) + 0.5) / (len(items) + 0.5))
            total += weight
            for row, count in items:
                length = 1 - LENGTH_SHARE + LENGTH_SHARE * self._lengths[row] / self._mean_length
                scores[row] += weight * count * (SATURATION + 1) / (count + SATURATION * length)  # type: ignore[assignment]
                shares[row] += weight  # type: ignore[assignment]
        found = [row for row in scores if allowed_N[row] and shares[row] >= LEAST_SHARE * total]
        return np.array(sorted(found, key=lambda row: (-scores[row], row))[:limit], dtype=np.int64)


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """One ranking of several: an item scores 1 / (60 + its rank) in each that has it, ranks counted from 1.

    [7, 8, 9] and [9]: 9 scores 1/63 + 1/61, more than 7 with 1/61. Equal scores: as in the first ranking.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda row: -scores[row])
