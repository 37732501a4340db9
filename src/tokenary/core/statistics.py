"""Figures with intervals, and the correlation of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its interval; nan where it is not defined.

    Parameters
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """The standard error that it stands for, as a 95% interval; infinite where there is none."""
        width = self.high - self.low
        return math.inf if math.isnan(width) else width / (2 * 1.96)

    @property
    def moved(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float | None]:
        """Return it as plain JSON types, None for what is not finite."""
        return {name: round(value, 4) if math.isfinite(value) else None for name, value in asdict(self).items()}


def interval(value: float, draws: Array, level: float = 0.95) -> Interval:
    """Return a figure with the middle `level` of its bootstrap draws.

    Parameters
    ----------
    value : float
        The figure.
    draws : (R,) float64 array
        nan where a draw is not defined; with more than 1% of them there is no interval.
    level : float
        Of the interval.
    """
    defined = draws[~np.isnan(draws)]
    if not len(draws) or len(defined) < 0.99 * len(draws):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the correlation of ranks, ties at their mean rank; None where one does not vary."""
    first, second = (_ranks(np.asarray(each, dtype=np.float64)) for each in (x, y))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Array) -> Array:
    less = (values[:, None] > values).sum(1)
    return less + ((values[:, None] == values).sum(1) - 1) / 2
