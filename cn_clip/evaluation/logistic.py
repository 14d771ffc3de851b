"""Multinomial logistic regression on frozen features: the fit, the choice of its strength, draws of few shots."""

# N rows, D features, C classes

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import ConfigError, DataError
from cn_clip.features.rows import FloatArray

if TYPE_CHECKING:
    import torch

Labels = NDArray[np.int64]

# As CLIP chooses it (arXiv:2103.00020, appendix A.3): these first, then halves of the last step around the best one.
FIRST_EXPONENTS = (-6, -4, -2, 0, 2, 4, 6)
NUM_HALVINGS = 4
MOST_ITERATIONS = 1000
_GRADIENT_TOLERANCE, _LOSS_TOLERANCE = 1e-7, 1e-12


@dataclass(frozen=True)
class Classifier:
    """Logits are `rows @ weights.T + bias`; weights (C, D) and bias (C,), float64."""

    weights_CD: NDArray[np.float64]
    bias_C: NDArray[np.float64]

    def logits(self, rows_ND: FloatArray) -> NDArray[np.float64]:
        """Logits (N, C)."""
        logits: NDArray[np.float64] = rows_ND.astype(np.float64) @ self.weights_CD.T + self.bias_C
        return logits


def fit(
    rows_ND: FloatArray,
    labels_N: Labels,
    num_classes: int,
    *,
    c: float,
    device: "torch.device | None" = None,
    start: Classifier | None = None,
) -> Classifier:
    """The minimum of `c * sum of cross-entropies + |weights|² / 2`, scikit-learn's objective; the bias is free.

    By L-BFGS in float64 from `start`, or zeros: equal inputs give equal weights. rows_ND: float32.
    Raises ConfigError for a c that is not above 0.
    """
    import torch
    from torch.nn.functional import cross_entropy

    if not (c > 0 and math.isfinite(c)):
        raise ConfigError(f"c: expected a number above 0, got {c}")
    rows, labels = torch.as_tensor(rows_ND, device=device).double(), torch.as_tensor(labels_N, device=device)
    begin = start or Classifier(np.zeros((num_classes, rows.shape[1])), np.zeros(num_classes))
    weights, bias = (torch.tensor(one, device=device, requires_grad=True) for one in (begin.weights_CD, begin.bias_C))
    solver = torch.optim.LBFGS(
        [weights, bias],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=_LOSS_TOLERANCE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        # A mean, so that the tolerance means the same for any number of rows.
        solver.zero_grad()
        loss = cross_entropy(rows @ weights.T + bias, labels) + weights.square().sum() / (2 * c * len(rows))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]
    return Classifier(weights.detach().cpu().numpy(), bias.detach().cpu().numpy())


def choose(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """(the best exponent of 10, the score of every one tried); of equal scores the smaller exponent is best."""
    scores = {float(exponent): score(float(exponent)) for exponent in FIRST_EXPONENTS}
    step = (FIRST_EXPONENTS[1] - FIRST_EXPONENTS[0]) / 2
    for _ in range(NUM_HALVINGS):
        best = _best(scores)
        for exponent in (best - step, best + step):
            if exponent not in scores and FIRST_EXPONENTS[0] <= exponent <= FIRST_EXPONENTS[-1]:
                scores[exponent] = score(exponent)
        step /= 2
    return _best(scores), scores


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda exponent: (-scores[exponent], exponent))


def held_out(labels_N: Labels, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: of each class the share, rounded, but one at least and never all; by seed alone."""
    generator = np.random.default_rng(seed)
    is_held_N = np.zeros(len(labels_N), dtype=np.bool_)
    for label in np.unique(labels_N):
        places = generator.permutation(np.flatnonzero(labels_N == label))
        is_held_N[places[: min(max(1, round(share * len(places))), len(places) - 1)]] = True
    return is_held_N


def draw_shots(labels_N: Labels, names: Sequence[str], shots: int, *, seed: int) -> NDArray[np.int64]:
    """The places of `shots` rows of each class, in the order of the rows; by seed alone.

    Raises DataError naming a class that has fewer.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for number, name in enumerate(names):
        places = np.flatnonzero(labels_N == number)
        if len(places) < shots:
            raise DataError(f"class {name!r} has {len(places)} training pictures; --shots {shots} needs as many")
        drawn.append(generator.choice(places, size=shots, replace=False))
    return np.sort(np.concatenate(drawn))
