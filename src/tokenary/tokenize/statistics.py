"""The few statistics that premiums need: dispersion, resampling of sentences, and a test of two variances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokenary.core.seeding import substream


def dispersion(values: Sequence[float]) -> dict[str, float | int | None]:
    """Say how unlike values are: coefficient of variation, Gini, max/min, variance; None for fewer than two."""
    x = np.sort(np.asarray(values, float))
    n = len(x)
    if n < 2 or x[0] <= 0:
        return {"n": n, "mean": float(x.mean()) if n else None, "cv": None, "gini": None, "max_min": None, "var": None}
    gini = float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum()))
    return {
        "n": n,
        "mean": float(x.mean()),
        "cv": float(coefficient_of_variation(x)),
        "gini": gini,
        "max_min": float(x[-1] / x[0]),
        "var": float(x.var(ddof=1)),
    }


def coefficient_of_variation(values: np.ndarray) -> np.ndarray:
    """Standard deviation (n - 1) over mean, along the last axis: (...,) of (..., n)."""
    return values.std(-1, ddof=1) / values.mean(-1)


def resample(n: int, seed: int, *names: int | str) -> np.ndarray:
    """Return how often each of n sentences is in the sample of that name, drawn with replacement: (n,) int64."""
    return substream(seed, *names).multinomial(n, np.full(n, 1.0 / n))


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the central interval of resampled values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def f_test(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Compare two variances (Fisher and Snedecor): their ratio, and the two-sided probability of one as far from 1."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if min(len(a), len(b)) < 2 or b.var() == 0:
        return math.nan, math.nan
    ratio, d1, d2 = float(a.var(ddof=1) / b.var(ddof=1)), len(a) - 1, len(b) - 1
    below = _beta(d1 * ratio / (d1 * ratio + d2), d1 / 2, d2 / 2)
    return ratio, 2 * min(below, 1 - below)


def _beta(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function, by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    c, d, result = 1.0, 0.0, 1.0
    for i in range(400):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d) if 1 + term * d else 1e30
        c = 1 + term / c if c else 1e-30
        result *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (result - 1)
