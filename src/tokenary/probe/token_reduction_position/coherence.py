"""Coherence of written texts: repetition, and facts that are told otherwise than they were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def distinct(ids: Sequence[int], n: int) -> float:
    """Return the share of different ones among the spans of n tokens; 1 where there is none."""
    spans = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(spans)) / len(spans) if spans else 1.0


def longest_repeat(ids: Sequence[int]) -> int:
    """Return the length of the longest span that occurs twice, perhaps overlapping; time quadratic in length."""
    best, above = 0, [0] * (len(ids) + 1)
    for i in range(1, len(ids) + 1):
        row = [0] * (len(ids) + 1)
        for j in range(1, i):
            if ids[i - 1] == ids[j - 1]:
                row[j] = above[j - 1] + 1
                best = max(best, row[j])
        above = row
    return best


def contradictions(chosen: ArrayLike, stated: ArrayLike) -> NDArray[np.float64]:
    """Return where another value is told than was stated, (n,); below 0 is no value, which contradicts nothing."""
    said, fact = np.asarray(chosen), np.asarray(stated)
    return ((said >= 0) & (said != fact)).astype(np.float64)


def position_errors(positions: NDArray[np.int64], anchors: NDArray[np.int64], compact: bool) -> int:
    """Count image tokens of a prompt whose position is not the one that they should have.

    Parameters
    ----------
    positions : (M,) array
        Counted from the first image token, in the order in which tokens are read.
    anchors : (M,) array
        The place of each among all image tokens.
    compact : bool
        Whether tokens are to be counted anew.
    """
    expected = np.arange(len(anchors)) if compact else np.asarray(anchors)
    return int((np.asarray(positions) != expected).sum())
