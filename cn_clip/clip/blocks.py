"""Pictures of different sizes in arrays of one shape: rows of values, behind a first row that counts them."""

# B batch, N rows of values at most, V values a row

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first row begins with height and width; height * width rows of values follow it, and then zeros.
#     a picture of 2 x 3 patches of V values, N = 8: [[2, 3, 0, …], patch 0, …, patch 5, zeros, zeros]
HEADER = 1


def write_block(values_NV: NDArray[np.float32], size: tuple[int, int], out_NV: NDArray[np.float32]) -> None:
    """Writes height * width rows of values, in the order of reading, into a block (1 + N, V)."""
    count = size[0] * size[1]
    out_NV[0] = 0
    out_NV[0, :2] = size
    out_NV[HEADER : HEADER + count] = values_NV[:count]
    out_NV[HEADER + count :] = 0


def trimmed(pixels: NDArray[Any]) -> NDArray[Any]:
    """A batch of blocks (B, 1 + N, V) without the rows that are zeros in all of them; other batches as they are."""
    if pixels.ndim != 3 or not len(pixels):
        return pixels
    longest = int((pixels[:, 0, 0] * pixels[:, 0, 1]).max())
    return np.ascontiguousarray(pixels[:, : HEADER + longest])
