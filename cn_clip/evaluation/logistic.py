"""Multinomial logistic regression on frozen features: the fit, the choice of its strength, few shots, and probes."""

# N rows, M of them held out, D features, C classes

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from cn_clip.errors import ConfigError, DataError
from cn_clip.evaluation import zeroshot
from cn_clip.evaluation.classification import ClassFeatures
from cn_clip.features.rows import FloatArray
from cn_clip.language import both
from cn_clip.progress import progress

Labels = NDArray[np.int64]

# As CLIP chooses it (arXiv:2103.00020, appendix A.3): these first, then halves of the last step around the best one.
FIRST_EXPONENTS = (-6, -4, -2, 0, 2, 4, 6)
NUM_HALVINGS = 4
MOST_ITERATIONS = 1000
HELD_OUT_SHARE = 0.2
# With one picture a class nothing can be held out to choose by; CLIP's example for its own features takes this.
C_OF_ONE_SHOT = 0.316
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
    device: torch.device | None = None,
    start: Classifier | None = None,
) -> Classifier:
    """The minimum of `c * sum of cross-entropies + |weights|² / 2`, scikit-learn's objective; the bias is free.

    By L-BFGS in float64 from `start`, or zeros: equal inputs give equal weights. rows_ND: float32.
    MPS has no float64: the processor computes instead. Raises ConfigError for a c that is not above 0.
    """
    if not (c > 0 and math.isfinite(c)):
        raise ConfigError(f"c: expected a number above 0, got {c}")
    if device is not None and device.type == "mps":
        device = torch.device("cpu")
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
    """Which rows are held out: of each class the share, rounded, at least one and never all; only the seed decides."""
    generator = np.random.default_rng(seed)
    is_held_N = np.zeros(len(labels_N), dtype=np.bool_)
    for label in np.unique(labels_N):
        positions = generator.permutation(np.flatnonzero(labels_N == label))
        is_held_N[positions[: min(max(1, round(share * len(positions))), len(positions) - 1)]] = True
    return is_held_N


def draw_shots(labels_N: Labels, names: Sequence[str], shots: int, *, seed: int) -> NDArray[np.int64]:
    """The positions of `shots` rows of each class, in the order of the rows; only the seed decides.

    Raises DataError naming a class that has fewer.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for number, name in enumerate(names):
        positions = np.flatnonzero(labels_N == number)
        if len(positions) < shots:
            raise DataError(f"class {name!r} has {len(positions)} training pictures; --shots {shots} needs as many")
        drawn.append(generator.choice(positions, size=shots, replace=False))
    return np.sort(np.concatenate(drawn))


# --- probes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The result of one seed: accuracies in percent, and the C that was chosen or given."""

    seed: int
    c: float
    num_train: int
    top1: float
    mean_per_class: float


def matched_labels(train: ClassFeatures, test: ClassFeatures, *, names: tuple[object, object]) -> Labels:
    """The test labels in the numbers of the training classes of the same names; names: of both, for messages.

    Raises DataError for rows of two lengths, for a single class, and for one that only the test has.
    """
    wide, other = train.rows_ND.shape[1], test.rows_ND.shape[1]
    if wide != other:
        raise DataError(f"{names[0]} has features of {wide} numbers, {names[1]} of {other}; use one model")
    if len(np.unique(train.labels_N)) < 2:
        raise DataError("expected two classes or more to tell apart, got one", at=names[0])
    number_of = {name: number for number, name in enumerate(train.classes)}
    for label in np.unique(test.labels_N).tolist():
        if test.classes[label] not in number_of:
            raise DataError(
                f"the class {test.classes[label]!r} is not among those of {names[0]}; "
                "name the folders of a class alike",
                at=names[1],
            )
    numbers = np.array([number_of.get(name, -1) for name in test.classes], dtype=np.int64)
    return numbers[test.labels_N]


def probe(
    train: ClassFeatures,
    test: ClassFeatures,
    test_labels_N: Labels,
    *,
    seed: int,
    shots: int | None = None,
    c: float | None = None,
    device: torch.device | None = None,
) -> Probe:
    """One draw, one choice of C, one fit, one test. test_labels_N: in the numbers of the training classes.

    shots: pictures a class to draw; None: all. c: None for the one of the best accuracy on a fifth held out.
    """
    if shots is not None:
        drawn = draw_shots(train.labels_N, train.classes, shots, seed=seed)
        train = ClassFeatures(train.rows_ND[drawn], train.labels_N[drawn], train.classes)
    c = c or _chosen_c(train, seed, device)
    fitted = fit(train.rows_ND, train.labels_N, len(train.classes), c=c, device=device)
    result = zeroshot.accuracy(fitted.logits(test.rows_ND).astype(np.float32), test_labels_N)
    return Probe(seed, c, len(train.rows_ND), 100 * result.top1, 100 * result.mean_per_class)


def _chosen_c(data: ClassFeatures, seed: int, device: torch.device | None) -> float:
    is_held_N = held_out(data.labels_N, share=HELD_OUT_SHARE, seed=seed)
    if not is_held_N.any():
        return C_OF_ONE_SHOT
    rows_ND, labels_N = data.rows_ND[~is_held_N], data.labels_N[~is_held_N]
    held_rows_MD, held_labels_M = data.rows_ND[is_held_N], data.labels_N[is_held_N]
    start: Classifier | None = None
    with progress(None, both("次", "fits"), both("选正则强度 C", "choosing C")) as bar:

        def score(exponent: float) -> float:
            nonlocal start
            start = fit(rows_ND, labels_N, len(data.classes), c=10**exponent, device=device, start=start)
            bar.advance()
            return float((start.logits(held_rows_MD).argmax(axis=1) == held_labels_M).mean())

        exponent, _ = choose(score)
    return float(10**exponent)


def mean_of(probes: Sequence[Probe]) -> dict[str, float]:
    """The means over the probes, in percent, and the standard deviation of top-1."""
    top1 = [one.top1 for one in probes]
    means = {"top1": float(np.mean(top1)), "top1_std": float(np.std(top1))}
    return {**means, "mean_per_class": float(np.mean([one.mean_per_class for one in probes]))}
