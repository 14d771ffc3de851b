"""Exact top-k by inner product, in blocks; the retrieval commands and recall during training use it."""

# Q queries, N gallery rows, D dimensions, K results, P (query, gallery) pairs

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cn_clip.errors import ConfigError, DataError
from cn_clip.ranks import full_float32

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

GALLERY_BLOCK = 32768
_SCORES_IN_FLIGHT = 1 << 23
_PAIRS_IN_FLIGHT = 8192
_NO_ROW = np.iinfo(np.int64).max
_ROUNDOFF = 2.0**-24


class Matches(NamedTuple):
    """The best gallery rows of each query, best first."""

    indices: IntArray
    scores: FloatArray


def top_k(
    queries_QD: FloatArray,
    gallery_ND: FloatArray,
    k: int,
    *,
    query_block: int | None = None,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
) -> Matches:
    """The k gallery rows with the largest inner product for each query: indices and scores, both (Q, min(k, N)).

    Scores are computed in float64 and rounded to float32; they fall along a row, and equal scores keep gallery order.
    The float32 matrix product on `device` only rules rows out, by a margin no smaller than its rounding error, so the
    result depends neither on the blocks nor on the device. Memory beyond the inputs and the result: one block of
    scores (query_block * gallery_block, by default 8 million) and its candidates.

    queries_QD, gallery_ND: finite float32. Raises ConfigError for k or a block below 1, DataError for arrays of other
    shapes, for NaN or infinity (naming the row) and for rows so long that a product overflows float32.
    """
    for name, value in (("k", k), ("query_block", query_block), ("gallery_block", gallery_block)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    queries_QD, gallery_ND = _checked(queries_QD, "queries"), _checked(gallery_ND, "gallery")
    if queries_QD.shape[1] != gallery_ND.shape[1]:
        raise DataError(f"queries have {queries_QD.shape[1]} dimensions, the gallery has {gallery_ND.shape[1]}")
    margin_Q = _margins(queries_QD, gallery_ND)
    num_queries, kept = len(queries_QD), min(k, len(gallery_ND))
    best = Matches(
        np.full((num_queries, kept), _NO_ROW, dtype=np.int64), np.full((num_queries, kept), -np.inf, dtype=np.float32)
    )
    if not kept:
        return best
    gallery_block = min(gallery_block, len(gallery_ND))
    step = query_block or max(1, _SCORES_IN_FLIGHT // gallery_block)
    # The margins count on float32 products.
    with full_float32(torch.device(device)), torch.no_grad():
        for offset in range(0, len(gallery_ND), gallery_block):
            block_ND = gallery_ND[offset : offset + gallery_block]
            on_device = torch.tensor(block_ND, device=device)
            for start in range(0, num_queries, step):
                rows = slice(start, start + step)
                part = Matches(best.indices[rows], best.scores[rows])
                query_P, row_P = _candidates(queries_QD[rows], on_device, part.scores, margin_Q[rows])
                score_P = _exact_scores(queries_QD[rows], block_ND, query_P, row_P)
                best.indices[rows], best.scores[rows] = _merged(part, query_P, row_P + offset, score_P)
    return best


def _checked(rows: FloatArray, name: str) -> FloatArray:
    if rows.ndim != 2:
        raise DataError(f"{name}: expected rows of vectors (2 dimensions), got shape {rows.shape}")
    if rows.dtype != np.float32:
        raise DataError(f"{name}: expected float32, got {rows.dtype}")
    for start in range(0, len(rows), GALLERY_BLOCK):
        finite = np.isfinite(rows[start : start + GALLERY_BLOCK]).all(axis=1)
        if not finite.all():
            raise DataError(f"{name}: row {start + int(np.argmin(finite))} holds NaN or infinity")
    return np.ascontiguousarray(rows)


def _lengths(rows: FloatArray) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def _margins(queries_QD: FloatArray, gallery_ND: FloatArray) -> NDArray[np.float64]:
    """Bound on |float32 score - exact score| of each query: D roundings of at most |q||g|, and flushed subnormals."""
    bound_Q = _lengths(queries_QD) * _lengths(gallery_ND).max(initial=0.0)
    if bound_Q.max(initial=0.0) >= np.finfo(np.float32).max / 2:
        row = int(np.argmax(bound_Q))
        raise DataError(f"queries: row {row} is too long for float32 products; divide the vectors by their lengths")
    steps = queries_QD.shape[1] + 4
    tiny = float(np.finfo(np.float32).tiny)
    margin_Q: NDArray[np.float64] = 1.01 * steps * (_ROUNDOFF * bound_Q + tiny)
    return margin_Q


def _candidates(
    queries_QD: FloatArray, gallery: torch.Tensor, best_QK: FloatArray, margin_Q: NDArray[np.float64]
) -> tuple[IntArray, IntArray]:
    """Pairs (query, row of this block), in that order, that can still be among the best; a few more than the best."""
    scores_QN = torch.tensor(queries_QD, device=gallery.device) @ gallery.T
    floor_Q = best_QK[:, -1].astype(np.float64) - margin_Q
    kept = best_QK.shape[1]
    if kept <= scores_QN.shape[1]:
        # Both the k-th score of this block and the score compared with it may be off, hence twice the margin.
        kth_Q = scores_QN.topk(kept, dim=1).values[:, -1].cpu().numpy().astype(np.float64)
        floor_Q = np.maximum(floor_Q, kth_Q - 2 * margin_Q)
    limit_Q = np.nextafter(floor_Q.astype(np.float32), np.float32(-np.inf))
    pairs_P2 = (scores_QN >= torch.tensor(limit_Q, device=gallery.device)[:, None]).nonzero().cpu().numpy()
    return pairs_P2[:, 0], pairs_P2[:, 1]


def _exact_scores(queries_QD: FloatArray, gallery_ND: FloatArray, query_P: IntArray, row_P: IntArray) -> FloatArray:
    scores_P = np.empty(len(query_P), dtype=np.float32)
    for start in range(0, len(query_P), _PAIRS_IN_FLIGHT):
        pairs = slice(start, start + _PAIRS_IN_FLIGHT)
        products_PD = queries_QD[query_P[pairs]].astype(np.float64) * gallery_ND[row_P[pairs]]
        scores_P[pairs] = products_PD.sum(axis=1)
    return scores_P


def _merged(best: Matches, query_P: IntArray, index_P: IntArray, score_P: FloatArray) -> Matches:
    """The best of the rows kept so far and of new pairs, by score falling, then by gallery row rising."""
    num_queries, kept = best.indices.shape
    query = np.concatenate([np.repeat(np.arange(num_queries), kept), query_P])
    index = np.concatenate([best.indices.ravel(), index_P])
    score = np.concatenate([best.scores.ravel(), score_P])
    order = np.lexsort((index, -score, query))
    first_Q = np.searchsorted(query[order], np.arange(num_queries))
    chosen_QK = order[first_Q[:, None] + np.arange(kept)]
    return Matches(index[chosen_QK], score[chosen_QK])
