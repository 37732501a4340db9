"""The pairs of neighbours in a batch: how often each occurs and where, kept up to date while they are merged."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from tokenary.tokenize.dynamic_tokenization.heap import COUNT, HEAD, LEFT, RIGHT, pop, push
from tokenary.tokenize.dynamic_tokenization.places import SYMBOL, find, merge
from tokenary.tokenize.dynamic_tokenization.rules import NEVER, UNKNOWN, joined

# What is counted: merges, pairs that were ever known, pairs in the heap; and the pair that is asked about.
MERGES, USED, WAITING, ASKED = range(4)


class Pairs:
    """Counts and places of the pairs of a batch.

    Parameters
    ----------
    symbols : ndarray
        (N,) the batch, row after row, in symbols from 0 on.
    lengths : sequence of int
        Of the rows.
    kinds, sizes : sequence of int
        `PairRules.kind` and bytes of every symbol.
    asks : bool
        `PairRules.asks`.
    """

    def __init__(
        self, symbols: np.ndarray, lengths: Sequence[int], kinds: Sequence[int], sizes: Sequence[int], asks: bool
    ) -> None:
        size, first = len(symbols), len(kinds)
        self._tokens = np.full((size, 6), -1, np.int32)
        self._tokens[:, SYMBOL] = symbols
        pairs = np.empty((3 * size, 5), np.int32)  # each merged place opens two pairs at most
        all_kinds, all_sizes = np.zeros(first + size, np.int8), np.zeros(first + size, np.int32)
        all_kinds[:first], all_sizes[:first] = kinds, sizes
        offsets = np.cumsum(all_sizes[symbols]) - all_sizes[symbols]  # of every token, in bytes
        self._made = np.empty((size, 3), np.int32)  # of every merge: left, right, and how often
        seen = np.full((2, first + size), -1, np.int32)
        ends = np.zeros(size + 1, bool)
        ends[np.cumsum([0, *lengths])] = True
        used = find(ends[1:], self._tokens, pairs, all_kinds, all_sizes, asks)
        heap = np.empty((used + 2 * size, 2), np.int64)
        self._state = np.array([0, used, 0, -1])
        _push_new(0, pairs, heap, self._state)
        tables = (self._tokens, pairs, heap, all_kinds, all_sizes, seen, self._made, offsets, self._state)
        self._tables = (first, asks, *tables)

    def run(self, most: int, answer: int) -> tuple[int, int, int]:
        """Merge the most frequent pair, the first in the batch on a tie, again and again, until a question comes up.

        Parameters
        ----------
        most : int
            Most merges, those of earlier calls included.
        answer : int
            To the question that was returned last, what `PairRules.join` says.

        Returns
        -------
        tuple of int
            Where in the bytes of the batch the left token begins, the right one begins, and ends; zeros at the end.
        """
        return _run(most, answer, *self._tables)

    @property
    def made(self) -> np.ndarray:
        """Left symbol, right symbol and occurrences of every merge, in order: (M, 3) int32."""
        return self._made[: self._state[MERGES]]

    @property
    def symbols(self) -> np.ndarray:
        """The batch (N,) int32 as it is now, -1 where a token was taken into the one before."""
        return self._tokens[:, SYMBOL]


@numba.njit(cache=True)
def _run(
    most: int,
    answer: int,
    first: int,
    asks: bool,
    tokens: np.ndarray,
    pairs: np.ndarray,
    heap: np.ndarray,
    kinds: np.ndarray,
    sizes: np.ndarray,
    seen: np.ndarray,
    made: np.ndarray,
    offsets: np.ndarray,
    state: np.ndarray,
) -> tuple[int, int, int]:
    """Merge until there were `most` merges, no pair is left, or one must be asked about; see `Pairs.run`."""
    pair, kind = state[ASKED], answer
    state[ASKED] = -1
    while True:
        if pair >= 0 and not kind & NEVER:
            left, right = pairs[pair, LEFT], pairs[pair, RIGHT]
            number, known = state[MERGES], state[USED]
            new = first + number
            kinds[new], sizes[new] = kind, sizes[left] + sizes[right]
            done, state[USED] = merge(pair, new, known, asks, tokens, pairs, kinds, sizes, seen)
            made[number, LEFT], made[number, RIGHT], made[number, COUNT] = left, right, done
            state[MERGES] += 1
            _push_new(known, pairs, heap, state)
        if state[MERGES] >= most:
            return 0, 0, 0
        pair, state[WAITING] = pop(pairs, heap, state[WAITING])
        if pair < 0:
            return 0, 0, 0
        left, right = pairs[pair, LEFT], pairs[pair, RIGHT]
        kind = joined(kinds[left], kinds[right], asks)
        if kind == UNKNOWN:
            state[ASKED] = pair
            begin = offsets[pairs[pair, HEAD]]
            return begin, begin + sizes[left], begin + sizes[left] + sizes[right]


@numba.njit(cache=True)
def _push_new(first: int, pairs: np.ndarray, heap: np.ndarray, state: np.ndarray) -> None:
    for pair in range(first, state[USED]):
        state[WAITING] = push(pair, pairs, heap, state[WAITING])
