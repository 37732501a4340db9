"""The statistics: correlations that may be undefined, regressions with a second variable, and the gate before both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenary.core.seeding import substream


def binomial_error(correct: np.ndarray) -> float:
    """Return the standard error of a share of 0/1 values; 0 for none."""
    share = float(correct.mean()) if len(correct) else 0.0
    return (share * (1 - share) / max(1, len(correct))) ** 0.5


def majority(golds: np.ndarray) -> int:
    """Return the most frequent answer; of several, the lowest."""
    return int(np.bincount(golds).argmax())


def length_only(golds: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Predict the most frequent answer of each word length, (N,); of few items a length, it flatters itself."""
    predicted = np.zeros_like(golds)
    for length in np.unique(lengths):
        predicted[lengths == length] = majority(golds[lengths == length])
    return predicted


def above_majority(correct: np.ndarray, golds: np.ndarray) -> bool:
    """Tell whether the accuracy exceeds that of the most frequent answer by more than two standard errors.

    Where it does not, what correlates with correctness says which questions have that answer, not what the model can.
    """
    if not len(correct):
        return False
    return float(correct.mean() - (golds == majority(golds)).mean()) > 2 * binomial_error(correct)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the correlation of two variables (N,); None where one is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float | None:
    """Return the correlation of x and y at equal `given`, all (N,): that of what regressions on it leave over."""
    design = np.stack([np.ones_like(given), given], 1).astype(np.float64)
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (x, y)]
    if min(map(np.ptp, left), default=0.0) < 1e-9:
        return None
    return pearson(*left)


def slopes(y: np.ndarray, *x: np.ndarray) -> np.ndarray | None:
    """Regress y on some variables at once: what y gains a unit of each, (len(x),).

    Returns
    -------
    ndarray or None
        None where a variable is constant, or follows from the others. A constant y has slopes of 0.
    """
    design = np.stack([np.ones(len(y)), *x], 1).astype(np.float64)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    return np.linalg.lstsq(design, y.astype(np.float64), rcond=None)[0][1:]


@dataclass(frozen=True)
class Logistic:
    """A logistic regression.

    Attributes
    ----------
    coefficients, errors : ndarray
        Log-odds a unit of each variable, and their standard errors, without the intercept.
    intercept : float
        Log-odds where all variables are 0.
    """

    coefficients: np.ndarray
    errors: np.ndarray
    intercept: float


def logistic(y: np.ndarray, *x: np.ndarray) -> Logistic | None:
    """Fit by maximum likelihood, Newton's steps halved until the likelihood rises.

    Parameters
    ----------
    y : ndarray
        0 or 1, (N,).
    *x : ndarray
        Variables, (N,) each.

    Returns
    -------
    Logistic or None
        None where no finite maximum exists: y is constant or separable, or the variables depend on each other.
    """
    scale = [float(values.std()) or 1.0 for values in x]
    centred = [(values - values.mean()) / size for values, size in zip(x, scale, strict=True)]
    design = np.stack([np.ones(len(y)), *centred], 1).astype(np.float64)
    if len(y) < 2 or np.ptp(y) == 0 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None

    def likelihood(beta: np.ndarray) -> float:
        logits = design @ beta
        return float((y * logits - np.logaddexp(0, logits)).sum())

    beta = np.zeros(design.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-design @ beta))
        information = design.T @ (design * (chance * (1 - chance))[:, None])
        if np.linalg.cond(information) > 1e12 or np.abs(beta).max() > 30:
            return None
        step = np.linalg.solve(information, design.T @ (y - chance))
        while likelihood(beta + step) < likelihood(beta) and np.abs(step).max() > 1e-12:
            step = step / 2
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            spread = np.sqrt(np.diag(np.linalg.inv(information)))[1:]
            shift = sum(b * values.mean() / size for b, values, size in zip(beta[1:], x, scale, strict=True))
            return Logistic(beta[1:] / scale, spread / scale, float(beta[0] - shift))
    return None


def bootstrap(
    statistic: Callable[..., float | None], columns: Sequence[np.ndarray], resamples: int, seed: int
) -> np.ndarray:
    """Return a statistic of resampled items, (<= resamples,): draws that leave it undefined are left out.

    Parameters
    ----------
    statistic : callable
        Takes the columns of the drawn items.
    columns : sequence of ndarray
        (N,) each; an item is drawn with its value in all of them.
    resamples, seed : int
        How many draws, and of which stream.
    """
    stream, n = substream(seed, "charbench", "bootstrap"), len(columns[0])
    draws = (stream.integers(0, n, n) for _ in range(resamples if n else 0))
    found = [statistic(*(column[drawn] for column in columns)) for drawn in draws]
    return np.array([value for value in found if value is not None])


def interval(draws: np.ndarray) -> list[float] | None:
    """Return the middle 95% of the draws; None of fewer than 20."""
    return [float(edge) for edge in np.quantile(draws, (0.025, 0.975))] if len(draws) >= 20 else None


def jaccard(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return how much two sets of errors overlap, given which answers are correct (N,); None without errors."""
    either = int((~first.astype(bool) | ~second.astype(bool)).sum())
    return int((~first.astype(bool) & ~second.astype(bool)).sum()) / either if either else None


def by_value(values: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Return count, accuracy and its standard error of the items of each value of a feature."""
    parts = [(value, correct[values == value]) for value in np.unique(values)]
    return [
        {"value": float(v), "n": len(part), "accuracy": float(part.mean()), "error": binomial_error(part)}
        for v, part in parts
    ]


def mean_defined(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are defined; None of none."""
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None
