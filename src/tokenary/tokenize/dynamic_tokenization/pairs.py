"""The pairs of neighbours in a batch: how often each occurs and where, kept up to date while they are merged.

The batch is a linked list of tokens, and the places of every pair are a linked list through it, so that a merge touches
its own occurrences and their neighbours only: all merges together cost time in proportion to the tokens that they join.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np

from tokenary.tokenize.dynamic_tokenization.rules import NEVER, SOLID, SPACED

# Rows of the table of tokens, and of that of pairs; -1 stands for none.
SYMBOL, BEFORE, AFTER, PAIR, PREVIOUS, NEXT = range(6)
LEFT, RIGHT, COUNT, HEAD, TAIL = range(5)


class Pairs:
    """Counts and places of the pairs of a batch.

    Parameters
    ----------
    symbols : ndarray
        (N,) the batch, row after row, in symbols from 0 on.
    lengths : sequence of int
        Of the rows.
    kinds : sequence of int
        `PairRules.kind` of every symbol.
    """

    def __init__(self, symbols: np.ndarray, lengths: Sequence[int], kinds: Sequence[int]) -> None:
        size = len(symbols)
        self.lengths, self.symbols = lengths, len(kinds)
        self._kinds = np.zeros(len(kinds) + size, np.uint8)
        self._kinds[: len(kinds)] = kinds
        self._tokens = np.full((6, size), -1, np.int32)
        self._tokens[SYMBOL] = symbols
        starts = np.zeros(size + 1, bool)
        starts[np.cumsum([0, *lengths])] = True
        inside = np.flatnonzero(~starts[1:-1])  # places with a neighbour behind
        self._tokens[AFTER, inside], self._tokens[BEFORE, inside + 1] = inside + 1, inside
        left, right = symbols[inside], symbols[inside + 1]
        free = ~_refused(self._kinds[left], self._kinds[right])
        keys, numbers = np.unique(left[free] * len(kinds) + right[free], return_inverse=True)
        self._pairs = np.full((5, len(keys) + 2 * size), -1, np.int32)  # each merged place opens two pairs at most
        self._pairs[COUNT] = 0
        self._pairs[LEFT, : len(keys)], self._pairs[RIGHT, : len(keys)] = keys // len(kinds), keys % len(kinds)
        _attach_all(inside[free], numbers, self._tokens, self._pairs)
        self._seen = np.full((2, len(self._kinds)), -1, np.int32)
        self._heap = np.empty((2, self._pairs.shape[1]), np.int64)
        self._used, self._best = len(keys), -1
        self._waiting = _push_all(0, self._used, self._pairs, self._heap, 0)

    def best(self) -> tuple[int, int] | None:
        """Return the most frequent pair that was not returned yet, the first in the batch on a tie; None at the end."""
        self._best, self._waiting = _next(self._pairs, self._heap, self._waiting)
        if self._best < 0:
            return None
        left, right = self._pairs[:2, self._best].tolist()
        return left, right

    def merge(self, kind: int) -> int:
        """Make a new symbol of the pair that was returned last, everywhere from left to right; return how often."""
        new, first = self.symbols, self._used
        self._kinds[new] = kind
        self.symbols += 1
        done, self._used = _merge(self._best, new, first, self._tokens, self._pairs, self._kinds, self._seen)
        self._waiting = _push_all(first, self._used, self._pairs, self._heap, self._waiting)
        return done

    def rows(self) -> Iterator[list[int]]:
        """Yield the symbols of each row, -1 where one was taken into the one before."""
        symbols, at = self._tokens[SYMBOL].tolist(), 0
        for length in self.lengths:
            yield symbols[at : at + length]
            at += length


@numba.njit(cache=True)
def _merge(
    pair: int, new: int, used: int, tokens: np.ndarray, pairs: np.ndarray, kinds: np.ndarray, seen: np.ndarray
) -> tuple[int, int]:
    """Merge a pair everywhere, from left to right; return how often, and how many pairs are known then.

    ``seen`` (2, symbols) numbers the pairs of a symbol before the new one, and behind it; it is left as it was.
    """
    symbol, first, done = tokens[SYMBOL], used, 0
    while pairs[HEAD, pair] >= 0:
        at = pairs[HEAD, pair]
        taken, before = tokens[AFTER, at], tokens[BEFORE, at]
        after = tokens[AFTER, taken]
        for place in (before, at, taken):
            _detach(place, tokens, pairs)
        symbol[at], symbol[taken], tokens[AFTER, at] = new, -1, after
        if after >= 0:
            tokens[BEFORE, after] = at
        for side, place, other in ((0, before, before), (1, at, after)):
            if other < 0:
                continue
            known = symbol[other]
            left, right = (known, new) if side == 0 else (new, known)
            if _refused_fast(kinds[left], kinds[right]):
                continue
            if seen[side, known] < 0:
                seen[side, known] = used
                pairs[LEFT, used], pairs[RIGHT, used] = left, right
                used += 1
            _attach(place, seen[side, known], tokens, pairs)
        done += 1
    for number in range(first, used):
        side = 0 if pairs[RIGHT, number] == new else 1
        seen[side, pairs[side, number]] = -1
    return done, used


def _refused(left: Any, right: Any) -> Any:
    """Whether two kinds never merge: a special token, or white space inside."""
    return (((left | right) & NEVER) != 0) | (((left & SOLID) != 0) & ((right & SPACED) != 0))


_refused_fast = numba.njit(cache=True)(_refused)


@numba.njit(cache=True)
def _attach_all(places: np.ndarray, numbers: np.ndarray, tokens: np.ndarray, pairs: np.ndarray) -> None:
    for n in range(len(places)):
        _attach(places[n], numbers[n], tokens, pairs)


@numba.njit(cache=True)
def _attach(place: int, pair: int, tokens: np.ndarray, pairs: np.ndarray) -> None:
    """Add a place behind the others of a pair."""
    last = pairs[TAIL, pair]
    tokens[PAIR, place], tokens[PREVIOUS, place], tokens[NEXT, place] = pair, last, -1
    if last < 0:
        pairs[HEAD, pair] = place
    else:
        tokens[NEXT, last] = place
    pairs[TAIL, pair] = place
    pairs[COUNT, pair] += 1


@numba.njit(cache=True)
def _detach(place: int, tokens: np.ndarray, pairs: np.ndarray) -> None:
    """Take a place out of its pair, if it begins one."""
    if place < 0 or tokens[PAIR, place] < 0:
        return
    pair, last, following = tokens[PAIR, place], tokens[PREVIOUS, place], tokens[NEXT, place]
    if last < 0:
        pairs[HEAD, pair] = following
    else:
        tokens[NEXT, last] = following
    if following < 0:
        pairs[TAIL, pair] = last
    else:
        tokens[PREVIOUS, following] = last
    pairs[COUNT, pair] -= 1
    tokens[PAIR, place] = -1


# ------------------------------------------------------------------------------ the heap (2, P): rank and pair


@numba.njit(cache=True)
def _rank(pair: int, pairs: np.ndarray) -> int:
    """Lowest for the most frequent pair, then for the one that stands first; above 0 for one that is gone."""
    return pairs[HEAD, pair] - pairs[COUNT, pair] * 4294967296 if pairs[COUNT, pair] else 1


@numba.njit(cache=True)
def _push_all(first: int, end: int, pairs: np.ndarray, heap: np.ndarray, size: int) -> int:
    for pair in range(first, end):
        size = _push(pair, pairs, heap, size)
    return size


@numba.njit(cache=True)
def _push(pair: int, pairs: np.ndarray, heap: np.ndarray, size: int) -> int:
    rank = _rank(pair, pairs)
    if rank > 0:
        return size
    at = size
    while at and heap[0, (at - 1) // 2] > rank:
        heap[:, at] = heap[:, (at - 1) // 2]
        at = (at - 1) // 2
    heap[0, at], heap[1, at] = rank, pair
    return size + 1


@numba.njit(cache=True)
def _next(pairs: np.ndarray, heap: np.ndarray, size: int) -> tuple[int, int]:
    """Take the first pair out, -1 if none is left; one that lost occurrences meanwhile is put back behind others."""
    while size:
        rank, pair = heap[0, 0], heap[1, 0]
        size -= 1
        at = 0
        while 2 * at + 1 < size:
            child = 2 * at + 1
            if child + 1 < size and heap[0, child + 1] < heap[0, child]:
                child += 1
            if heap[0, size] <= heap[0, child]:
                break
            heap[:, at] = heap[:, child]
            at = child
        heap[:, at] = heap[:, size]
        if rank == _rank(pair, pairs):
            return pair, size
        size = _push(pair, pairs, heap, size)
    return -1, 0
