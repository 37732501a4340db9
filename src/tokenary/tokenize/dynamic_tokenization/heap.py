"""A heap of pairs by how often they occur: the most frequent first, of equally frequent ones the first in the batch.

It is an array (P, 2): ranks, and the numbers of the pairs. Ranks get old while pairs lose and gain occurrences; a pair
is ranked anew when it comes out.
"""

from __future__ import annotations

import numba
import numpy as np

# Columns of the table of pairs.
LEFT, RIGHT, COUNT, HEAD, TAIL = range(5)


@numba.njit(cache=True)
def push(pair: int, pairs: np.ndarray, heap: np.ndarray, size: int) -> int:
    """Put a pair in, unless it is gone; return the new size."""
    rank = _rank(pair, pairs)
    if rank > 0:
        return size
    at = size
    while at and heap[(at - 1) // 2, 0] > rank:
        _move(heap, at, (at - 1) // 2)
        at = (at - 1) // 2
    heap[at, 0], heap[at, 1] = rank, pair
    return size + 1


@numba.njit(cache=True)
def pop(pairs: np.ndarray, heap: np.ndarray, size: int) -> tuple[int, int]:
    """Take the first pair out, -1 if none is left; one that lost occurrences meanwhile is put back behind others."""
    while size:
        rank, pair = heap[0, 0], heap[0, 1]
        size -= 1
        at = 0
        while 2 * at + 1 < size:
            child = 2 * at + 1
            if child + 1 < size and heap[child + 1, 0] < heap[child, 0]:
                child += 1
            if heap[size, 0] <= heap[child, 0]:
                break
            _move(heap, at, child)
            at = child
        _move(heap, at, size)
        if rank == _rank(pair, pairs):
            return pair, size
        size = push(pair, pairs, heap, size)
    return -1, 0


@numba.njit(cache=True)
def _rank(pair: int, pairs: np.ndarray) -> int:
    """Lowest for the most frequent pair, then for the one that stands first; above 0 for one that is gone."""
    return pairs[pair, HEAD] - pairs[pair, COUNT] * 4294967296 if pairs[pair, COUNT] else 1


@numba.njit(cache=True)
def _move(heap: np.ndarray, to: int, at: int) -> None:
    heap[to, 0], heap[to, 1] = heap[at, 0], heap[at, 1]
