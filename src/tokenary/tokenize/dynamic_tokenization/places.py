"""Where the pairs of a batch occur: a linked list of tokens, and through it one of the places of every pair.

A merge touches its own occurrences and their neighbours only: all merges together cost time in proportion to the tokens
that they join.
"""

from __future__ import annotations

import numba
import numpy as np

from tokenary.tokenize.dynamic_tokenization.heap import COUNT, HEAD, LEFT, RIGHT, TAIL
from tokenary.tokenize.dynamic_tokenization.rules import LONGEST, NEVER, joined

# Columns of the table of tokens; -1 stands for none.
SYMBOL, BEFORE, AFTER, PAIR, PREVIOUS, NEXT = range(6)


@numba.njit(cache=True)
def find(
    ends: np.ndarray, tokens: np.ndarray, pairs: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, asks: bool
) -> int:
    """Link the tokens of each row, and number the pairs that may merge; return how many there are."""
    slots = 16
    while slots < 2 * len(ends):
        slots *= 2
    table, used = np.full(slots, -1, np.int32), 0
    for place in range(len(ends) - 1):
        if ends[place]:
            continue
        tokens[place, AFTER], tokens[place + 1, BEFORE] = place + 1, place
        left, right = tokens[place, SYMBOL], tokens[place + 1, SYMBOL]
        if _refused(left, right, kinds, sizes, asks):
            continue
        slot = ((left * 2147483648 + right) * -7046029254386353131 >> 20) & (slots - 1)
        while table[slot] >= 0 and (pairs[table[slot], LEFT] != left or pairs[table[slot], RIGHT] != right):
            slot = (slot + 1) & (slots - 1)
        if table[slot] < 0:
            table[slot] = used
            used = _open(left, right, pairs, used)
        _attach(place, table[slot], tokens, pairs)
    return used


@numba.njit(cache=True)
def merge(
    pair: int,
    new: int,
    used: int,
    asks: bool,
    tokens: np.ndarray,
    pairs: np.ndarray,
    kinds: np.ndarray,
    sizes: np.ndarray,
    seen: np.ndarray,
) -> tuple[int, int]:
    """Merge a pair everywhere, from left to right; return how often, and how many pairs are known then.

    ``seen`` (2, symbols) numbers the pairs of a symbol before the new one, and behind it; it is left as it was.
    """
    symbol, first, done = tokens[:, SYMBOL], used, 0
    while pairs[pair, HEAD] >= 0:
        at = pairs[pair, HEAD]
        taken, before = tokens[at, AFTER], tokens[at, BEFORE]
        after = tokens[taken, AFTER]
        for place in (before, at, taken):
            _detach(place, tokens, pairs)
        symbol[at], symbol[taken], tokens[at, AFTER] = new, -1, after
        if after >= 0:
            tokens[after, BEFORE] = at
        for side, place, other in ((0, before, before), (1, at, after)):
            if other < 0:
                continue
            known = symbol[other]
            left, right = (known, new) if side == 0 else (new, known)
            if _refused(left, right, kinds, sizes, asks):
                continue
            if seen[side, known] < 0:
                seen[side, known] = used
                used = _open(left, right, pairs, used)
            _attach(place, seen[side, known], tokens, pairs)
        done += 1
    for number in range(first, used):
        side = 0 if pairs[number, RIGHT] == new else 1
        seen[side, pairs[number, side]] = -1
    return done, used


@numba.njit(cache=True)
def _refused(left: int, right: int, kinds: np.ndarray, sizes: np.ndarray, asks: bool) -> bool:
    return sizes[left] + sizes[right] > LONGEST or joined(kinds[left], kinds[right], asks) == NEVER


@numba.njit(cache=True)
def _open(left: int, right: int, pairs: np.ndarray, used: int) -> int:
    """Add a pair without places; return how many there are."""
    pairs[used, LEFT], pairs[used, RIGHT], pairs[used, COUNT] = left, right, 0
    pairs[used, HEAD], pairs[used, TAIL] = -1, -1
    return used + 1


@numba.njit(cache=True)
def _attach(place: int, pair: int, tokens: np.ndarray, pairs: np.ndarray) -> None:
    """Add a place behind the others of a pair."""
    last = pairs[pair, TAIL]
    tokens[place, PAIR], tokens[place, PREVIOUS], tokens[place, NEXT] = pair, last, -1
    if last < 0:
        pairs[pair, HEAD] = place
    else:
        tokens[last, NEXT] = place
    pairs[pair, TAIL] = place
    pairs[pair, COUNT] += 1


@numba.njit(cache=True)
def _detach(place: int, tokens: np.ndarray, pairs: np.ndarray) -> None:
    """Take a place out of its pair, if it begins one."""
    if place < 0 or tokens[place, PAIR] < 0:
        return
    pair, last, following = tokens[place, PAIR], tokens[place, PREVIOUS], tokens[place, NEXT]
    if last < 0:
        pairs[pair, HEAD] = following
    else:
        tokens[last, NEXT] = following
    if following < 0:
        pairs[pair, TAIL] = last
    else:
        tokens[following, PREVIOUS] = last
    pairs[pair, COUNT] -= 1
    tokens[place, PAIR] = -1
