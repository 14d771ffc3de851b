"""Exact top-k by inner product, in blocks; the retrieval commands and recall during training use it."""

# Q queries, N gallery rows, D dimensions, K results

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval.scanning import FloatArray, IntArray, Matches, best_rows, largest_norm, margins

if TYPE_CHECKING:
    import torch

__all__ = ["GALLERY_BLOCK", "Gallery", "Matches", "top_k"]

GALLERY_BLOCK = 32768


@dataclass(frozen=True)
class Gallery:
    """Rows that were checked once, to be searched often: finite, contiguous float32."""

    rows_ND: FloatArray
    largest_norm: float

    @classmethod
    def of(cls, rows_ND: FloatArray) -> "Gallery":
        """Raises DataError for another shape or type, and naming the first row that holds NaN or infinity."""
        rows_ND = _rows(rows_ND, "gallery")
        largest = largest_norm(rows_ND)
        if not math.isfinite(largest):
            _refuse_infinite(rows_ND, "gallery")
        return cls(rows_ND, largest)

    def __len__(self) -> int:
        return len(self.rows_ND)

    def vectors(self, start: int, stop: int) -> FloatArray:
        """Consecutive rows; a view."""
        return self.rows_ND[start:stop]

    def gather(self, rows_N: IntArray) -> FloatArray:
        """Rows in any order."""
        return self.rows_ND[rows_N]


def top_k(
    queries_QD: FloatArray,
    gallery_ND: FloatArray | Gallery,
    k: int,
    *,
    query_block: int | None = None,
    gallery_block: int = GALLERY_BLOCK,
    device: "str | torch.device" = "cpu",
) -> Matches:
    """The k gallery rows with the largest inner product for each query: indices and scores, both (Q, min(k, N)).

    Scores are computed in float64 and rounded to float32; they fall along a row, and equal scores keep gallery order.
    The float32 matrix product on `device` only rules rows out, by a margin no smaller than its rounding error, so the
    result depends neither on the blocks nor on the device. Memory beyond the inputs and the result: one block of
    scores (query_block * gallery_block, at most 8 million by default) and its candidates.

    queries_QD, gallery_ND: finite float32; a `Gallery` for rows that several calls search, which are then checked once.
    Raises ConfigError for k or a block below 1, DataError for arrays of other shapes, for NaN or infinity (naming the
    row) and for rows so long that a product overflows float32.
    """
    for name, value in (("k", k), ("query_block", query_block), ("gallery_block", gallery_block)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    queries_QD = _rows(queries_QD, "queries")
    _refuse_infinite(queries_QD, "queries")
    gallery = gallery_ND if isinstance(gallery_ND, Gallery) else Gallery.of(gallery_ND)
    if queries_QD.shape[1] != gallery.rows_ND.shape[1]:
        raise DataError(f"queries have {queries_QD.shape[1]} dimensions, the gallery has {gallery.rows_ND.shape[1]}")
    margin_Q = margins(queries_QD, gallery.largest_norm)
    if str(device).partition(":")[0] == "cpu":
        return best_rows([gallery], queries_QD, k, query_block=query_block, row_block=gallery_block)
    from cn_clip.retrieval import on_device  # it imports torch, which an index on disk is searched without

    blocks = (query_block, gallery_block)
    return on_device.best_rows(queries_QD, gallery.rows_ND, k, margin_Q, blocks=blocks, device=device)


def _rows(rows: FloatArray, name: str) -> FloatArray:
    if rows.ndim != 2:
        raise DataError(f"{name}: expected rows of vectors (2 dimensions), got shape {rows.shape}")
    if rows.dtype != np.float32:
        raise DataError(f"{name}: expected float32, got {rows.dtype}")
    return np.ascontiguousarray(rows)


def _refuse_infinite(rows: FloatArray, name: str) -> None:
    for start in range(0, len(rows), GALLERY_BLOCK):
        finite = np.isfinite(rows[start : start + GALLERY_BLOCK]).all(axis=1)
        if not finite.all():
            raise DataError(f"{name}: row {start + int(np.argmin(finite))} holds NaN or infinity")
