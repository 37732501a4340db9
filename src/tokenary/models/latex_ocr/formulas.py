"""Labelled pictures without end: formulas drawn from a small grammar, set by matplotlib, compared symbol by symbol."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenary.core.errors import InputError
from tokenary.core.seeding import substream

_LETTERS = ("a", "b", "c", "d", "f", "g", "h", "k", "m", "n", "p", "q", "r", "s", "t", "u", "v", "w", "x", "y", "z")
_GREEK = ("alpha", "beta", "gamma", "delta", "lambda", "mu", "pi", "rho", "sigma", "theta", "omega", "phi", "psi")
_UNSEEN = re.compile(r"\\(begin|end)\{[a-z]+\*?\}(\{[lcr|]+\})?|\\kern\s*-?[\d.]+\s*[a-z]{2}|\\[\[\]]")
_SYMBOL = re.compile(r"\\[A-Za-z]+|\\.|\S")
# spellings of one and the same picture
_SAME = {r"\left": "", r"\right": "", r"\,": "", r"\;": "", r"\:": "", r"\!": "", r"\ ": "", r"\quad": "", "$": ""}
_SAME |= {r"\varphi": r"\phi", r"\lbrack": "[", r"\rbrack": "]", r"\prime": "'", r"\displaystyle": "", "~": ""}
_SAME |= {r"\tfrac": r"\frac", r"\dfrac": r"\frac", r"\limits": "", r"\nolimits": "", r"\nonumber": ""}
_SAME |= {"&": "", r"\\": "", r"\textstyle": "", r"\scriptstyle": "", r"\scriptscriptstyle": ""}


def formulas(count: int, seed: int = 0) -> list[str]:
    """Draw formulas: sums of terms with powers, indices, fractions, roots, sums and integrals.

    Parameters
    ----------
    count, seed : int
        Formula i of a seed is the same whatever the count.
    """
    return [_formula(substream(seed, "formula", i)) for i in range(count)]


def _formula(draw: np.random.Generator) -> str:
    def pick(options: Sequence[str]) -> str:
        return options[int(draw.integers(len(options)))]

    def atom() -> str:
        kind = draw.random()
        if kind < 0.55:
            return pick(_LETTERS)
        return rf"\{pick(_GREEK)}" if kind < 0.8 else str(draw.integers(1, 10))

    def term(depth: int = 0) -> str:
        kind = draw.random()
        if kind < 0.25 or depth == 2:
            return atom()
        if kind < 0.45:
            return rf"{pick(_LETTERS)}^{{{term(2)}}}"
        if kind < 0.65:
            return rf"{pick(_LETTERS)}_{{{term(2)}}}"
        if kind < 0.85:
            return rf"\frac{{{term(depth + 1)}}}{{{term(depth + 1)}}}"
        if kind < 0.92:
            return rf"\sqrt{{{term(depth + 1)}}}"
        body = rf"{pick(_LETTERS)}_{{i}}"
        return rf"\sum_{{i=1}}^{{n}} {body}" if kind < 0.96 else rf"\int_{{0}}^{{1}} {pick(_LETTERS)} d x"

    left = pick(_LETTERS)
    right = term()
    for _ in range(draw.integers(0, 3)):
        right += f" {pick(('+', '-'))} {term()}"
    return f"{left} = {right}"


@functools.cache
def _parser() -> object:
    try:
        from matplotlib.mathtext import MathTextParser
    except ImportError as error:
        raise InputError("formulas are set by matplotlib: pip install 'tokenary[vision]'") from error
    return MathTextParser("agg")


def render(formula: str, dpi: float = 200.0, margin: int = 12) -> NDArray[np.uint8]:
    """Set a formula in Computer Modern: a grey picture (h, w), black on white.

    Parameters
    ----------
    formula : str
        LaTeX, as far as matplotlib's mathtext knows it, without dollar signs.
    dpi : float
        Size of the type.
    margin : int
        White pixels around.

    Raises
    ------
    InputError
        matplotlib is missing, or cannot set the formula.
    """
    parser = _parser()
    from matplotlib.font_manager import FontProperties

    try:
        found = parser.parse(f"${formula}$", dpi=dpi, prop=FontProperties(math_fontfamily="cm"))  # type: ignore[attr-defined]
    except ValueError as error:
        raise InputError(f"matplotlib cannot set {formula!r}") from error
    return 255 - np.pad(np.asarray(found.image, np.uint8), margin)


def symbols(formula: str) -> list[str]:
    """Split a formula into the symbols that are seen: commands and letters, spaces, sizes and environments left out.

    Braces stay, except around a single symbol that is an index or a power: ``x^{2}`` is ``x^2``.
    """
    found = [symbol for part in _SYMBOL.findall(_UNSEEN.sub("", formula)) if (symbol := _SAME.get(part, part))]
    out: list[str] = []
    for symbol in found:
        if symbol == "}" and len(out) > 2 and out[-2] == "{" and out[-3] in "^_":
            out.pop(-2)
        else:
            out.append(symbol)
    return out


def exact_match(read: str, formula: str) -> bool:
    """Whether both show the same symbols in the same order."""
    return symbols(read) == symbols(formula)


def edit_distance(read: str, formula: str) -> float:
    """Insertions, deletions and exchanges of symbols between the two, as a share of the longer one's; 0 is equal."""
    a, b = symbols(read), symbols(formula)
    row = list(range(len(b) + 1))
    for i, symbol in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (symbol != other))
    return row[-1] / max(len(a), len(b), 1)
