"""What the claims about fewer image tokens share: how well each arm reads, and what of the picture it retains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tokenary.bench.reduction import retained
from tokenary.core.budget import Budget
from tokenary.core.claim import Figure, Outcome
from tokenary.core.statistics import Array, Interval
from tokenary.reduce.base import Reducer
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom

KEEPS = (0.5, 0.25, 0.125)
Key = tuple[str, float]


@dataclass
class Answers:
    """How well pictures were read, by arm and share kept; *none* and *blind* at share 1.

    Attributes
    ----------
    right : mapping of (str, float) to array
        (seeds, n), 0 to 1.
    keeps : sequence of float
        Shares that figures are the mean over.
    families : list of str, optional
        Of each picture; what is retained is the mean over them.
    """

    right: dict[Key, Array] = field(default_factory=dict)
    keeps: Sequence[float] = KEEPS
    families: list[str] | None = None

    def mean(self, name: str, keeps: Sequence[float] | None = None) -> Array:
        """Return an arm's answers, the mean over shares kept: (seeds, n)."""
        fixed = (name, 1.0) in self.right
        return np.mean([self.right[name, 1.0 if fixed else keep] for keep in keeps or self.keeps], axis=0)

    def retained(self, name: str, keeps: Sequence[float] | None = None, minus: str | None = None) -> Interval:
        """Return what an arm retains of what the picture adds, or how much more than another one."""
        other = None if minus is None else self.mean(minus, keeps)
        full, blind = self.mean("none", keeps), self.mean("blind", keeps)
        return retained(self.mean(name, keeps), full, blind, self.families, minus=other)

    def figure(self, name: str) -> Figure:
        """Return what an arm retains, as a claim states it."""
        kept = self.retained(name)
        return Figure(name, kept.value, kept.error)

    def more_than(self, name: str) -> dict[str, dict[str, float | None]]:
        """Return how much more an arm retains than each other one."""
        others = dict.fromkeys(other for other, _ in self.right if other not in (name, "none", "blind"))
        return {other: self.retained(name, minus=other).to_json() for other in others}

    def table(self) -> dict[str, Any]:
        """Return all figures as plain JSON types."""
        found: dict[str, Any] = {}
        for key in self.right:
            row = found.setdefault(key[0], {"retained": self.retained(key[0]).to_json()})
            row[f"{key[1]:.2%}"] = self.row(key)
        return found

    def row(self, key: Key) -> dict[str, Any]:
        """Return the figures of an arm at one share kept."""
        return {"right": round(float(self.right[key].mean()), 4), "retained": self.retained(*_alone(key)).to_json()}


def _alone(key: Key) -> tuple[str, tuple[float]]:
    return key[0], (key[1],)


def controls(
    keep: Budget, random_seeds: int, seed: int, positions: Literal["compact", "original"] = "compact"
) -> dict[str, list[Reducer]]:
    """Return the controls at a budget, with kept tokens counted as the method counts them."""
    found: dict[str, list[Reducer]] = {
        "random": [ReduceRandom(keep, seed + i) for i in range(random_seeds)],
        "grid": [ReduceGrid(keep)],
        "pooling": [ReducePool(keep)],
    }
    for reducers in found.values():
        for reducer in reducers:
            reducer.positions = positions
    return found


def outcome(
    answers: Answers, method: str, rivals: Sequence[str], runs: int, details: Mapping[str, Any], others: Sequence[str]
) -> Outcome:
    """Return what was measured of a method; the baseline is the best of its rivals.

    Parameters
    ----------
    answers : Answers
        Of all arms.
    method : str
        Its arm.
    rivals : sequence of str
        What it is compared with.
    runs : int
        Random choices that were averaged.
    details : mapping
        Figures beside those of all arms.
    others : sequence of str
        Controls, beside *none*, *blind* and *random*.
    """
    best = max(rivals, key=lambda name: answers.retained(name).value)
    beside = dict.fromkeys(name for name in ("none", "blind", "random", *others, *rivals) if name != best)
    return Outcome(
        method=answers.figure(method),
        baseline=answers.figure(best),
        controls=tuple(answers.figure(name) for name in beside),
        n=answers.right["none", 1.0].shape[1],
        runs=runs,
        paired_spread=answers.retained(method, minus=best).error,
        details={"arms": answers.table(), "more_than": answers.more_than(method), **details},
    )
