"""Intervals: what an arm differs from its control by, on the same items, with a bootstrap interval; no score of scores.

Nearly all figures here are ratios of sums over items: a mean, precision, F1, a rate of false names. So an item brings
what it adds above and below the line, and every draw of the bootstrap weighs items.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tokenary.core.seeding import substream
from tokenary.core.statistics import Array, Interval, interval


@dataclass(frozen=True)
class Parts:
    """What every item adds to a ratio of sums.

    Parameters
    ----------
    above, below : array
        (n,), or (seeds, n) for an arm that draws: its ratio is that of all seeds together.
    """

    above: Array
    below: Array

    @classmethod
    def mean(cls, values: ArrayLike, among: ArrayLike | None = None) -> Parts:
        """Return the mean of values (n,) or (seeds, n), over the items in `among` (n,) bool, or all."""
        table = np.asarray(values, dtype=np.float64)
        some = np.ones(table.shape[-1]) if among is None else np.asarray(among, dtype=np.float64)
        below = np.broadcast_to(some, table.shape).astype(np.float64)
        return cls(np.where(below > 0, table, 0.0), below)

    def drawn(self, weights: Array) -> Array:
        """Return the ratio under weights (draws, n) of the items: (draws,), nan where nothing is below the line."""
        sums = [weights @ (each.sum(0) if each.ndim == 2 else each) for each in (self.above, self.below)]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sums[1] > 0, sums[0] / sums[1], np.nan)

    @property
    def value(self) -> float:
        """The ratio itself."""
        return float(self.drawn(np.ones((1, self.above.shape[-1])))[0])


@functools.lru_cache(maxsize=4)
def weights(n: int, resamples: int, seed: int) -> Array:
    """Return how often each of n items is drawn, (resamples, n) float64."""
    stream = substream(seed, "token-reduction-position", "bootstrap")
    return stream.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def estimate(parts: Parts, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the ratio of an arm with a bootstrap interval over items."""
    return interval(parts.value, parts.drawn(weights(parts.above.shape[-1], resamples, seed)))


def effect(method: Parts, control: Parts, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the difference of two arms on the same items: paired, so that what is hard for both does not count.

    Parameters
    ----------
    method, control : Parts
        Of n items in the same order; each of one run or of several seeds.
    resamples, seed : int
        Draws of items, and their name.
    """
    drawn = weights(method.above.shape[-1], resamples, seed)
    return interval(method.value - control.value, method.drawn(drawn) - control.drawn(drawn))


def jackknife(values: Sequence[float], whole: float, level_t: float = 2.09) -> Interval:
    """Return a figure with an interval from its values without each of g groups of items (delete-a-group jackknife).

    For figures that are no ratio of sums, where items drawn twice would look alike. ``level_t`` is the quantile of t,
    2.09 for 20 groups.
    """
    parts = np.asarray(values, dtype=np.float64)
    error = math.sqrt((len(parts) - 1) / len(parts) * float(((parts - parts.mean()) ** 2).sum()))
    return Interval(whole, whole - level_t * error, whole + level_t * error)


#: Quantiles of t, 97.5%, for 1 to 9 degrees of freedom; further ones are taken for 2.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def over_seeds(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences of a few seeds with a t interval; nan where one is not finite."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 2.0
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def figures(effects: dict[str, Interval]) -> dict[str, Any]:
    """Return effects as plain JSON types."""
    return {name: each.to_json() for name, each in effects.items()}
