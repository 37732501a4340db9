"""Counts of runs of tokens: a table that merges, and the entropies that follow from it.

Every token of a text is the end of one run of `order` tokens, padded at the start of the text, so that the counts of
all shorter runs are sums over this one table. Each run has two counts, one for either half of the texts (by the parity
of a checksum of the text), so that one half can be predicted from the other.

The **sequential code length** is that of an adaptive coder that could really send the ids. In a context u of k-1
tokens, seen n times with t different successors, the next token x, seen c times, is coded with probability

    (c - d) / (theta + n)          if it has been seen in u,
    (theta + d t) / (theta + n)    for "something new", and then x in the context one token shorter, which counts a
                                   token once for every context that sent it down; at the bottom, uniformly among the
                                   tokens of the vocabulary that have not occurred at all.

This is a two-parameter Poisson-Dirichlet law in each context, whose probability does not depend on the order of the
draws: the length is a function of the counts, so it merges, although it is the length of a sequential code. theta and d
are the best of a grid at each order, and their choice is charged.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from tokenary.tokenize.base import EncodedText
from tokenary.tokenize.tokenizer_information.columns import group, sums

DISCOUNTS = tuple(i / 10 for i in range(1, 10))
CONCENTRATIONS = (0.0, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0, 2048.0)
MIX = 5.0  # lambda = n / (n + MIX) in the held-out mixture


@dataclass(frozen=True)
class Level:
    """The different runs of one length that a table of longer ones ends in.

    Attributes
    ----------
    first : ndarray
        (m,) a column of the table for each run.
    of : ndarray
        (R,) the run that each column ends in, ascending.
    counts : ndarray
        (m,) tokens that end each run.
    context : ndarray
        (m,) number of what stands before the last token of each run.
    """

    first: np.ndarray
    of: np.ndarray
    counts: np.ndarray
    context: np.ndarray


@dataclass(frozen=True)
class Grams:
    """How often each run of tokens occurs.

    Attributes
    ----------
    runs : ndarray
        (order, R) int32, ids plus one, 0 before the start of a text; columns ascending from the last token to the
        first, each once.
    counts : ndarray
        (2, R) int64, for the two halves of the texts.
    """

    runs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[EncodedText], order: int) -> Grams:
        """Count the runs of some texts."""
        runs, half = [np.zeros((order, 0), np.int32)], [np.zeros(0, np.int8)]
        for text in texts:
            padded = np.concatenate([np.zeros(order - 1, np.int32), text.ids + 1], dtype=np.int32)
            runs.append(np.stack([padded[i : i + len(text.ids)] for i in range(order)]))
            half.append(np.full(len(text.ids), zlib.crc32(text.text.encode()) & 1, np.int8))
        stacked, side = np.concatenate(runs, axis=1), np.concatenate(half)
        return cls(stacked, np.stack([side == 0, side == 1]).astype(np.int64)).merged()

    def merged(self) -> Grams:
        """Sort the runs, and add up the counts of equal ones."""
        first, where = group(self.runs[::-1])
        return Grams(self.runs[:, first], np.stack([sums(where, row, len(first)) for row in self.counts]))

    def __add__(self, other: Grams) -> Grams:
        if not other.runs.shape[1]:
            return self
        if not self.runs.shape[1]:
            return other
        runs, counts = ([getattr(part, name) for part in (self, other)] for name in ("runs", "counts"))
        return Grams(np.concatenate(runs, 1), np.concatenate(counts, 1)).merged()

    @property
    def total(self) -> int:
        """Tokens that were counted."""
        return int(self.counts.sum())

    @functools.cached_property
    def levels(self) -> list[Level]:
        """The runs of every length from 1 on; as columns ascend from the last token, equal ones stand together."""
        found, counts = [], self.counts.sum(0)
        new = np.arange(len(counts)) == 0
        for length, row in enumerate(self.runs[::-1], start=1):
            new[1:] |= row[1:] != row[:-1]
            first, of = np.flatnonzero(new), np.cumsum(new, dtype=np.int32) - 1
            _, context = group(self.runs[-length:-1, first])
            found.append(Level(first.astype(np.int32), of, sums(of, counts, len(first)), context.astype(np.int32)))
        return found


def plug_in(grams: Grams, order: int | None = None) -> float:
    """Entropy in bits of the last token of a run given the others, from the counts as they are.

    Far too low where most runs occur once: report it only beside `sequential` or `held_out`. `order` is how many of the
    last tokens a run is taken to have, all by default.
    """
    level = grams.levels[(order or len(grams.runs)) - 1]
    joint, given = _entropy_sum(level.counts), _entropy_sum(sums(level.context, level.counts, len(level.counts)))
    return (given - joint) / grams.total


def _entropy_sum(counts: np.ndarray) -> float:
    """Sum of c log2 c, over distinct c in ascending order: the same whatever the order of the counts."""
    values, times = np.unique(counts[counts > 0], return_counts=True)
    return math.fsum((values * np.log2(values.astype(float)) * times).tolist())


def sequential(grams: Grams, vocab_size: int) -> float:
    """Length in bits of the adaptive code of all tokens counted, `order` - 1 tokens of context; see the module."""
    return sequential_orders(grams, vocab_size)[-1]


def sequential_orders(grams: Grams, vocab_size: int) -> list[float]:
    """Return the length of the adaptive code for each order from 1 on."""
    levels = grams.levels
    whole = [_best(level.context, level.counts) for level in levels]
    # What is sent down to a level is every longer run once, whatever the order that began above it.
    down = [_best(level.context, np.bincount(level.of[up.first])) for level, up in itertools.pairwise(levels)]
    novel = len(levels[0].first)
    types = (math.lgamma(vocab_size + 1) - math.lgamma(vocab_size - novel + 1)) / math.log(2)
    found = []
    for order, bits in enumerate(whole):
        for sent in reversed(down[:order]):
            bits += sent
        found.append(bits + types)
    return found


def _best(context: np.ndarray, counts: np.ndarray) -> float:
    """Bits of one level with the best of the grid, and of saying which: counts of runs, and what precedes each."""
    n, t = sums(context, counts, len(counts)), np.bincount(context)
    tables = [np.unique(values, return_counts=True) for values in (n[: len(t)], t, counts)]
    lengths = [
        _poisson_dirichlet(d, theta, *(part.astype(np.float64) for pair in tables for part in pair))
        for d, theta in itertools.product(DISCOUNTS, CONCENTRATIONS)
    ]
    return min(lengths) + math.log2(len(lengths))


@numba.njit(cache=True)
def _poisson_dirichlet(
    d: float,
    theta: float,
    n: np.ndarray,
    n_times: np.ndarray,
    t: np.ndarray,
    t_times: np.ndarray,
    c: np.ndarray,
    c_times: np.ndarray,
) -> float:
    """Bits of all contexts, from how many have n tokens, t types, and how many types occur c times."""
    nats = 0.0
    for i in range(len(n)):
        nats += n_times[i] * (math.lgamma(theta + n[i]) - math.lgamma(theta + 1.0))
    for i in range(len(t)):
        new = (t[i] - 1.0) * math.log(d) + math.lgamma(theta / d + t[i]) - math.lgamma(theta / d + 1.0)
        nats -= t_times[i] * new
    for i in range(len(c)):
        nats -= c_times[i] * (math.lgamma(c[i] - d) - math.lgamma(1.0 - d))
    return nats / math.log(2.0)


def held_out(grams: Grams, vocab_size: int) -> list[float] | None:
    """Cross-entropy in bits a token, of each half under a mixture over orders learned on the other half.

    ``P_k = w n(ux) / n(u) + (1 - w) P_{k-1}``, ``w = n(u) / (n(u) + 5)``, ``P_0 = 1 / V``: an upper bound of the
    entropy. One figure for each order from 1 on; None where either half is empty.
    """
    if (grams.counts.sum(1) == 0).any():
        return None
    bits = [0.0] * len(grams.runs)
    for learned, scored in (grams.counts, grams.counts[::-1]):
        some = np.flatnonzero(scored)
        chance = np.full(len(some), 1.0 / vocab_size)
        for order, level in enumerate(grams.levels):
            runs = sums(level.of, learned, len(level.first))
            contexts = sums(level.context, runs, len(runs))[level.context]
            of = level.of[some]
            chance = (runs[of] + MIX * chance) / (contexts[of] + MIX)
            bits[order] -= math.fsum((scored[some] * np.log2(chance)).tolist())
    return [sum_ / grams.total for sum_ in bits]
