"""The vector that several weighted parts ask for together; the command line and the service search with it."""

# P parts, D dimensions

from collections.abc import Sequence

import numpy as np

from cn_clip.errors import ConfigError
from cn_clip.retrieval.segments import FloatArray

# Below this length the parts have cancelled each other out: what is left is rounding.
SHORTEST = 1e-4


def mixed(rows_PD: FloatArray, weights: Sequence[float]) -> FloatArray:
    """The unit vector (D,) of the weighted sum of unit rows, float32; raises ConfigError when they cancel out.

    [[1, 0], [0, 1]] with the weights 3 and 4 give [0.6, 0.8].
    """
    sum_D = np.zeros(rows_PD.shape[1], dtype=np.float32)
    for row_D, weight in zip(rows_PD, weights, strict=True):
        sum_D += np.float32(weight) * row_D
    length = float(np.linalg.norm(sum_D))
    if length < SHORTEST:
        raise ConfigError("the weighted parts cancel each other out")
    unit_D: FloatArray = (sum_D / length).astype(np.float32)
    return unit_D
