"""How the tokens of a language fall with the size of its vocabulary, and the size at which languages are even.

power ``CTC(V) = a V^b``, least squares in logarithms (the paper's law); saturating ``CTC(V) = c + a V^b``, where it
levels off; local, straight lines in logarithms between measured sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokenary.core.errors import OptionError

Kind = Literal["power", "saturating", "local"]


@dataclass(frozen=True)
class Law:
    """CTC as a function of the vocabulary size, for one language.

    Attributes
    ----------
    kind : {"power", "saturating", "local"}
        Which form.
    a, b, c : float
        ``c + a V^b``; unused by the local form.
    sizes, counts : tuple
        The measured points, sizes ascending.
    rms : float
        Root mean square of the residual's logarithm.
    """

    kind: Kind
    a: float
    b: float
    c: float
    sizes: tuple[int, ...]
    counts: tuple[float, ...]
    rms: float

    def __call__(self, size: float) -> float:
        """Tokens expected at a vocabulary size."""
        if self.kind == "local":
            return math.exp(float(np.interp(math.log(size), np.log(self.sizes), np.log(self.counts))))
        return self.c + self.a * size**self.b

    def solve(self, target: float) -> float | None:
        """Vocabulary size at which `target` tokens are expected; None where the law never gets there."""
        if self.kind == "local":
            falling = np.minimum.accumulate(self.counts)
            if not falling[-1] <= target <= falling[0]:
                return None
            new = np.append(True, falling[1:] < falling[:-1])  # of the sizes with equal counts, the smallest
            return math.exp(float(np.interp(-math.log(target), -np.log(falling[new]), np.log(self.sizes)[new])))
        if target <= self.c or self.a <= 0 or self.b >= 0:
            return None
        return ((target - self.c) / self.a) ** (1 / self.b)


def fit_law(points: Mapping[int, float], kind: Kind = "power") -> Law:
    """Fit a law to measured points ``{vocabulary size: tokens}``.

    Raises
    ------
    OptionError
        Fewer than two points (three for the saturating form), or counts that are not positive.
    """
    need = 3 if kind == "saturating" else 2
    sizes, counts = sorted(points), [float(points[size]) for size in sorted(points)]
    if len(sizes) < need or min(counts) <= 0 or sizes[0] < 1:
        raise OptionError("points", dict(points), f"at least {need} sizes with positive counts")
    x, y = np.log(sizes), np.log(counts)

    def line(offset: float) -> tuple[float, float, float]:
        shifted = np.log(np.asarray(counts) - offset)
        b, log_a = np.polyfit(x, shifted, 1)
        rms = float(np.sqrt(np.mean((np.log(offset + np.exp(log_a + b * x)) - y) ** 2)))
        return math.exp(log_a), float(b), rms

    if kind == "local":
        return Law(kind, 0.0, 0.0, 0.0, tuple(sizes), tuple(counts), 0.0)
    offsets = np.linspace(0, 0.999 * min(counts), 400) if kind == "saturating" else np.zeros(1)
    (a, b, rms), c = min(((line(float(offset)), float(offset)) for offset in offsets), key=lambda pair: pair[0][2])
    return Law(kind, a, b, c, tuple(sizes), tuple(counts), rms)


@dataclass(frozen=True)
class Choice:
    """The vocabulary size chosen for a language.

    Attributes
    ----------
    size : int
        Tokens.
    reached : bool
        Whether the target is expected there; else the size was clamped to what is allowed.
    expected : float
        CTC by the law.
    """

    size: int
    reached: bool
    expected: float


def optimal_sizes(
    curves: Mapping[str, Mapping[int, float]], target: float, least: int, most: int, kind: Kind = "power"
) -> dict[str, Choice]:
    """Choose for every language the vocabulary size at which it needs `target` tokens.

    Parameters
    ----------
    curves : mapping
        ``{language: {vocabulary size: CTC}}``.
    target : float
        Tokens that every language should need.
    least, most : int
        Sizes are clamped to these; a language that cannot reach the target says so.
    kind : {"power", "saturating", "local"}
        The law.
    """
    found = {}
    for language, points in sorted(curves.items()):
        law = fit_law(points, kind)
        wanted = law.solve(target)
        if wanted is None:
            wanted = most if target < law(sorted(points)[-1]) else least
            reached = False
        else:
            reached = least <= round(wanted) <= most
        size = min(max(round(wanted), least), most)
        found[language] = Choice(size, reached, law(size))
    return found


def search(
    count: Callable[[int], float], target: float, least: int, most: int, start: int, tolerance: float = 0.005
) -> tuple[int, float]:
    """Look for the size whose *measured* count is nearest to a target, by halving; returns it and its count.

    ``count(size)`` trains and counts; sizes already counted are remembered. About log2((most - least) / 2) trainings.
    """
    known: dict[int, float] = {}

    def at(size: int) -> float:
        if size not in known:
            known[size] = count(size)
        return known[size]

    low, high, size = least, most, min(max(start, least), most)
    while low <= high and abs(at(size) - target) > tolerance * target:
        if at(size) > target:
            low = size + 1
        else:
            high = size - 1
        size = (low + high) // 2
    best = min(known, key=lambda size: (abs(known[size] - target), size))
    return best, known[best]
