"""N-gram counts that are learned while coding, interpolated from order 0 up.

order 0:    (count + 1) / (tokens + V)
order k:    P <- l count / n + (1 - l) P,   l = n / (n + 5),   wherever the last k tokens were seen before, n times
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

_PRIME, _WORD = 49157, (1 << 64) - 1
_STRENGTH = 5.0
_MOST = 64


@dataclass
class Guess:
    """A distribution over tokens: ``base * (count + 1) / (tokens + V)`` for all, and more for some.

    Attributes
    ----------
    base : float
        What is left for order 0.
    extra : dict of int to float
        What the higher orders add.
    order : int
        The highest order that knew the context.
    kinds : dict of int to int
        Of each token with extra, by the highest order that saw it here: ``(order - 1) * 12`` + 3 times the class of its
        count (1, 2, up to 4, more) + the class of its share (all, half or more, less).
    """

    base: float = 1.0
    extra: dict[int, float] = field(default_factory=dict)
    order: int = 0
    kinds: dict[int, int] = field(default_factory=dict)


class NGrams:
    """Counts of a growing text, or of several texts that grow side by side.

    Parameters
    ----------
    vocab_size : int
        V.
    order : int
        Longest context; 0 counts single tokens only.
    contexts : int
        Most contexts kept of each order; the oldest go first.
    """

    def __init__(self, vocab_size: int, order: int = 4, contexts: int = 500_000) -> None:
        self.order, self.contexts = order, contexts
        self.counts: NDArray[np.int32] = np.zeros(vocab_size, np.int32)
        self.total = vocab_size  # tokens + V
        # context -> the only token that ever followed it, once; or [n, {token: count}]
        self.tables: list[dict[int, int | tuple[list[int], dict[int, int]]]] = [{} for _ in range(order)]
        self._mass = 0.0  # sum of (count + 1) log (count + 1), which the entropy of order 0 follows from

    def guess(self, context: Sequence[int]) -> Guess:
        """Predict what follows the last tokens of a text."""
        found = Guess()
        keys = self._keys(context)
        for order in range(len(keys), 0, -1):
            entry = self.tables[order - 1].get(keys[order - 1])
            if entry is None:
                continue
            found.order = found.order or order
            n, counts = (1, {entry: 1}) if isinstance(entry, int) else (entry[0][0], entry[1])
            share = found.base * (n / (n + _STRENGTH)) / n
            for token, count in counts.items():
                if token in found.extra:
                    found.extra[token] += share * count
                else:
                    found.extra[token] = share * count
                    found.kinds[token] = _kind(order, count, n)
            found.base *= _STRENGTH / (n + _STRENGTH)
        return found

    def probability(self, guess: Guess, token: int) -> float:
        """Return what a guess says of one token."""
        return guess.base * ((int(self.counts[token]) + 1) / self.total) + guess.extra.get(token, 0.0)

    def entropy(self, guess: Guess) -> float:
        """Return the entropy of a guess in bits."""
        tokens = np.fromiter(guess.extra, np.int64, len(guess.extra))
        extra = np.fromiter(guess.extra.values(), np.float64, len(guess.extra))
        return float(_entropy(tokens, extra, self.counts, float(self.total), self._mass, guess.base))

    def update(self, context: Sequence[int], token: int) -> None:
        """Count one token behind its context."""
        before = int(self.counts[token]) + 1
        self._mass += _xlogx(float(before + 1)) - _xlogx(float(before))
        self.counts[token] = before
        self.total += 1
        for order, key in enumerate(self._keys(context)):
            table = self.tables[order]
            entry = table.get(key)
            if entry is None:
                if len(table) >= self.contexts:
                    del table[next(iter(table))]
                table[key] = token
            elif isinstance(entry, int):
                table[key] = ([2], {token: 2}) if entry == token else ([2], {entry: 1, token: 1})
            else:
                _count(*entry, token)

    def _keys(self, context: Sequence[int]) -> list[int]:
        """Hashes of the last 1, 2, ... tokens, each over its tokens from the oldest on."""
        keys = []
        for order in range(1, min(self.order, len(context)) + 1):
            key = 0
            for token in context[-order:]:
                key = (key * _PRIME + token + 1) & _WORD
            keys.append(key)
        return keys


def _kind(order: int, count: int, n: int) -> int:
    often = count - 1 if count < 3 else 2 if count < 5 else 3
    share = 0 if count == n else 1 if 2 * count >= n else 2
    return (order - 1) * 12 + 3 * often + share


def _count(total: list[int], counts: dict[int, int], token: int) -> None:
    """Count a continuation; a full context gives up its oldest single one, or ignores a newcomer."""
    if token not in counts and len(counts) >= _MOST:
        oldest = next((other for other, count in counts.items() if count == 1), None)
        if oldest is None:
            return
        del counts[oldest]
        total[0] -= 1
    counts[token] = counts.get(token, 0) + 1
    total[0] += 1


@njit(cache=True, nogil=True)
def _log(x):
    """Natural logarithm by IEEE operations alone: libms differ in last bits."""
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    u = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = u * u, 0.0
    for k in range(23, 0, -2):
        total = total * square + 1.0 / k
    return 2.0 * u * total + exponent * 0.6931471805599453


@njit(cache=True, nogil=True)
def _xlogx(x):
    return x * _log(x)


@njit(cache=True, nogil=True)
def _entropy(tokens, extra, counts, total, mass, base):
    """Entropy in bits: the tokens with extra one by one, all others in closed form."""
    own, inner, rest = 0.0, 0.0, 0.0  # of the tokens with extra: -sum p log p, sum q log q, sum q
    for i in range(len(tokens)):
        q = (counts[tokens[i]] + 1.0) / total
        p = base * q + extra[i]
        own -= _xlogx(p)
        inner += _xlogx(q)
        rest += q
    everything = mass / total - _log(total)  # sum q log q over all tokens
    other = -base * (_log(base) * (1.0 - rest) + everything - inner)
    return (own + other) / 0.6931471805599453
