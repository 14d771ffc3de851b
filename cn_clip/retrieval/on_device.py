"""Exact top-k with the float32 products on a GPU; `flat` calls it for devices other than the processor."""

# Q queries, N gallery rows, D dimensions, K results, P (query, gallery) pairs

import numpy as np
import torch
from numpy.typing import NDArray

from cn_clip.ranks import full_float32
from cn_clip.retrieval.scanning import SCORES_IN_FLIGHT, FloatArray, IntArray, Matches, exact_scores

_PAIRS_IN_FLIGHT = 8192
_NO_ROW = np.iinfo(np.int64).max


def best_rows(
    queries_QD: FloatArray,
    gallery_ND: FloatArray,
    k: int,
    margin_Q: NDArray[np.float64],
    *,
    blocks: tuple[int | None, int],
    device: str | torch.device,
) -> Matches:
    """As `flat.top_k`. margin_Q: see `scanning.margins`; blocks: queries and rows at a time."""
    query_block, gallery_block = blocks
    num_queries, kept = len(queries_QD), min(k, len(gallery_ND))
    best = Matches(
        np.full((num_queries, kept), _NO_ROW, dtype=np.int64), np.full((num_queries, kept), -np.inf, dtype=np.float32)
    )
    if not kept:
        return best
    gallery_block = min(gallery_block, len(gallery_ND))
    step = query_block or max(1, SCORES_IN_FLIGHT // gallery_block)
    # The margins count on float32 products.
    with full_float32(torch.device(device)), torch.no_grad():
        for offset in range(0, len(gallery_ND), gallery_block):
            block_ND = gallery_ND[offset : offset + gallery_block]
            on_device = torch.tensor(block_ND, device=device)
            for start in range(0, num_queries, step):
                rows = slice(start, start + step)
                part = Matches(best.indices[rows], best.scores[rows])
                query_P, row_P = _candidates(queries_QD[rows], on_device, part.scores, margin_Q[rows])
                score_P = _scores_of(queries_QD[rows], block_ND, query_P, row_P)
                best.indices[rows], best.scores[rows] = _merged(part, query_P, row_P + offset, score_P)
    return best


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


def _scores_of(queries_QD: FloatArray, gallery_ND: FloatArray, query_P: IntArray, row_P: IntArray) -> FloatArray:
    scores_P = np.empty(len(query_P), dtype=np.float32)
    for start in range(0, len(query_P), _PAIRS_IN_FLIGHT):
        pairs = slice(start, start + _PAIRS_IN_FLIGHT)
        scores_P[pairs] = exact_scores(queries_QD[query_P[pairs]], gallery_ND[row_P[pairs]])
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
