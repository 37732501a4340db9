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

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from tokenary.tokenize.base import EncodedText

DISCOUNTS = tuple(i / 10 for i in range(1, 10))
CONCENTRATIONS = (0.0, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0, 2048.0)
MIX = 5.0  # lambda = n / (n + MIX) in the held-out mixture


@dataclass(frozen=True)
class Grams:
    """How often each run of tokens occurs.

    Attributes
    ----------
    runs : ndarray
        (order, R) int32, ids plus one, 0 before the start of a text; columns ascending, each once.
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
            padded = np.concatenate([np.zeros(order - 1, np.int32), text.ids + 1])
            runs.append(np.stack([padded[i : i + len(text.ids)] for i in range(order)]).astype(np.int32))
            half.append(np.full(len(text.ids), zlib.crc32(text.text.encode()) & 1, np.int8))
        stacked, side = np.concatenate(runs, axis=1), np.concatenate(half)
        return cls(stacked, np.stack([side == 0, side == 1]).astype(np.int64)).merged()

    def merged(self) -> Grams:
        """Sort the runs, and add up the counts of equal ones."""
        first, where = group(self.runs)
        counts = np.zeros((2, len(first)), np.int64)
        for row, count in zip(counts, self.counts, strict=True):
            np.add.at(row, where, count)
        return Grams(self.runs[:, first], counts)

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

    def shorter(self, order: int) -> Grams:
        """Return the counts of the last `order` tokens of every run."""
        return Grams(self.runs[-order:], self.counts).merged()


def group(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find equal columns of (k, R): the first of each in ascending order, and for every column which it is."""
    n = columns.shape[1]
    if not len(columns) or not n:  # the empty context is one context
        return np.zeros(min(n, 1), np.int64), np.zeros(n, np.int64)
    bits = max(int(columns.max()).bit_length(), 1)
    words: list[np.ndarray] = []
    for start in range(0, len(columns), 64 // bits):
        word = np.zeros(n, np.uint64)
        for column in columns[start : start + 64 // bits]:
            word = (word << np.uint64(bits)) | column.astype(np.uint64)
        words.append(word)
    if len(words) == 1:
        _, first, where = np.unique(words[0], return_index=True, return_inverse=True)
        return first, where
    order = np.lexsort(words[::-1])
    new = np.ones(n, bool)
    new[1:] = np.any([word[order][1:] != word[order][:-1] for word in words], axis=0)
    where = np.empty(n, np.int64)
    where[order] = np.cumsum(new) - 1
    return order[new], where


def _sums(where: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    found = np.zeros(size, np.int64)
    np.add.at(found, where, values)
    return found


def plug_in(grams: Grams) -> float:
    """Entropy in bits of the last token of a run given the others, from the counts as they are.

    Far too low where most runs occur once: report it only beside `sequential` or `held_out`.
    """
    counts = grams.counts.sum(0)
    first, where = group(grams.runs[:-1])
    contexts = _sums(where, counts, len(first))
    joint, given = _entropy_sum(counts), _entropy_sum(contexts)
    return (given - joint) / grams.total


def _entropy_sum(counts: np.ndarray) -> float:
    """Sum of c log2 c, over distinct c in ascending order: the same whatever the order of the counts."""
    values, times = np.unique(counts[counts > 0], return_counts=True)
    return math.fsum((values * np.log2(values.astype(float)) * times).tolist())


def sequential(grams: Grams, vocab_size: int) -> float:
    """Length in bits of the adaptive code of all tokens counted, `order` - 1 tokens of context; see the module."""
    runs, counts, bits = grams.runs, grams.counts.sum(0), 0.0
    choices = len(DISCOUNTS) * len(CONCENTRATIONS)
    while len(runs):
        first, where = group(runs[:-1])
        n = _sums(where, counts, len(first))
        t = np.bincount(where, minlength=len(first))
        tables = [np.unique(values, return_counts=True) for values in (n, t, counts)]
        lengths = [
            _poisson_dirichlet(d, theta, *(part.astype(np.float64) for pair in tables for part in pair))
            for d, theta in itertools.product(DISCOUNTS, CONCENTRATIONS)
        ]
        bits += min(lengths) + math.log2(choices)
        shorter, where = group(runs[1:])
        counts, runs = np.bincount(where, minlength=len(shorter)), runs[1:, shorter]
    novel = int(counts.sum()) if len(counts) else 0  # one count: every type once
    return bits + (math.lgamma(vocab_size + 1) - math.lgamma(vocab_size - novel + 1)) / math.log(2)


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
    chance = np.full((2, grams.runs.shape[1]), 1.0 / vocab_size)
    for order in range(1, len(grams.runs) + 1):
        first, of_run = group(grams.runs[-order:])
        shorter, of_context = group(grams.runs[-order:-1])
        for learned, scored in ((0, 1), (1, 0)):
            runs = _sums(of_run, grams.counts[learned], len(first))[of_run]
            contexts = _sums(of_context, grams.counts[learned], len(shorter))[of_context]
            chance[learned] = (runs + MIX * chance[learned]) / (contexts + MIX)
            bits[order - 1] -= math.fsum((grams.counts[scored] * np.log2(chance[learned])).tolist())
    return [sum_ / grams.total for sum_ in bits]
