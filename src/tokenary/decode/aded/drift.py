"""The trigram table in use: a counted store, and what the text being written has done to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from tokenary.decode.aded.store import BITS, TrigramStore

#: What a trigram gains each time it is seen, the highest score, and how many of the last tokens are looked at.
STEP, CAP, WINDOW = np.float32(0.04), np.float32(3.0), 16


class Table(NamedTuple):
    """The arrays of a store and of the rows that drifted from it, as compiled code sees them.

    A drifted row r holds ``counts[r]`` successors from ``r * width`` on; its pair stands in an open-addressing table.
    """

    keys: np.ndarray  # (K,)
    starts: np.ndarray  # (K + 1,)
    tokens: np.ndarray  # (E,)
    scores: np.ndarray  # (E,)
    slots: np.ndarray  # pair or -1, (S,), S a power of two
    rows: np.ndarray  # row of the pair in each slot, (S,)
    counts: np.ndarray  # (R,)
    drifted_tokens: np.ndarray  # (R * width,)
    drifted_scores: np.ndarray  # (R * width,)
    width: int


class Drift:
    """What one text has done to the table: the store stays as it is, touched rows are copied on their first touch.

    Every trigram of the last 16 tokens gains 0.04 a call, up to 3; a pair or a successor that was never counted starts
    at 0. Rows are not normalised again, and stay sorted: likelier first, of equal scores the one touched last.

    Parameters
    ----------
    store : TrigramStore
        The counted table.
    """

    def __init__(self, store: TrigramStore) -> None:
        self._used = 0
        self._allocate(store, rows=256, width=store.fan_out + WINDOW)

    def _allocate(self, store: TrigramStore | Table, rows: int, width: int) -> None:
        self.table = Table(
            keys=store.keys,
            starts=store.starts,
            tokens=store.tokens,
            scores=store.scores,
            slots=np.full(4 * rows, -1, np.int64),
            rows=np.zeros(4 * rows, np.int64),
            counts=np.zeros(rows, np.int64),
            drifted_tokens=np.zeros(rows * width, np.int32),
            drifted_scores=np.zeros(rows * width, np.float32),
            width=width,
        )

    def _reserve(self) -> None:
        """Make room for the rows and successors that one touch may add."""
        old = self.table
        rows, width, used = len(old.counts), old.width, self._used
        more_rows = 2 * rows if used + WINDOW > rows else rows
        more_width = 2 * width if old.counts[:used].max(initial=0) + WINDOW > width else width
        if (more_rows, more_width) == (rows, width):
            return
        self._allocate(old, more_rows, more_width)
        new = self.table
        new.counts[:used] = old.counts[:used]
        for name in ("drifted_tokens", "drifted_scores"):
            getattr(new, name).reshape(-1, more_width)[:used, :width] = getattr(old, name).reshape(-1, width)[:used]
        _rehash(old.slots, old.rows, new.slots, new.rows)

    def touch(self, context: Sequence[int]) -> None:
        """Raise the trigrams of the last 16 tokens of `context`."""
        self._reserve()
        self._used = _touch(self.table, self._used, np.array(context[-WINDOW:], np.int64))

    def successors(self, a: int, b: int) -> dict[int, float]:
        """Return the successors of a pair and their scores as they are now, highest first."""
        own, start, count = find(self.table, a << BITS | b)
        tokens = self.table.drifted_tokens if own else self.table.tokens
        scores = self.table.drifted_scores if own else self.table.scores
        row = slice(start, start + count)
        return dict(zip(tokens[row].tolist(), scores[row].tolist(), strict=True))


@njit(cache=True)
def _slot(slots: np.ndarray, pair: int) -> int:
    """Index of the slot that holds `pair`, or of the free slot where it belongs."""
    mask = len(slots) - 1
    at = ((pair * 0x1E3779B97F4A7C15) >> 32) & mask  # multiplicative hashing, wraps in int64
    while slots[at] != pair and slots[at] != -1:
        at = (at + 1) & mask
    return at


@njit(cache=True)
def find(table: Table, pair: int) -> tuple[bool, int, int]:
    """Find the successors of a pair: whether they drifted, where they start, how many they are (0 if unknown)."""
    at = _slot(table.slots, pair)
    if table.slots[at] == pair:
        row = table.rows[at]
        return True, row * table.width, table.counts[row]
    low, high = 0, len(table.keys)
    while low < high:
        middle = (low + high) >> 1
        if table.keys[middle] < pair:
            low = middle + 1
        else:
            high = middle
    if low < len(table.keys) and table.keys[low] == pair:
        return False, table.starts[low], table.starts[low + 1] - table.starts[low]
    return False, 0, 0


@njit(cache=True)
def _touch(table: Table, used: int, window: np.ndarray) -> int:
    """Raise the trigrams of `window`; return how many rows are in use."""
    tokens, scores = table.drifted_tokens, table.drifted_scores
    for i in range(len(window) - 2):
        pair, token = window[i] << BITS | window[i + 1], window[i + 2]
        own, start, count = find(table, pair)
        if not own:
            at, first = _slot(table.slots, pair), used * table.width
            table.slots[at], table.rows[at] = pair, used
            tokens[first : first + count] = table.tokens[start : start + count]
            scores[first : first + count] = table.scores[start : start + count]
            table.counts[used], start, used = count, first, used + 1
        row = table.rows[_slot(table.slots, pair)]
        at = start
        while at < start + count and tokens[at] != token:
            at += 1
        score = STEP
        if at < start + count:
            score += scores[at]
        else:
            table.counts[row] += 1
        score = min(score, CAP)
        while at > start and scores[at - 1] <= score:
            tokens[at], scores[at] = tokens[at - 1], scores[at - 1]
            at -= 1
        tokens[at], scores[at] = token, score
    return used


@njit(cache=True)
def _rehash(old_slots: np.ndarray, old_rows: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> None:
    """Enter the pairs of one table into another."""
    for i in range(len(old_slots)):
        if old_slots[i] >= 0:
            at = _slot(slots, old_slots[i])
            slots[at], rows[at] = old_slots[i], old_rows[i]
