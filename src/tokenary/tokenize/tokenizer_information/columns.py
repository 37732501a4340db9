"""Equal columns of a table, and sums over them."""

from __future__ import annotations

import numpy as np


def group(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find equal columns of (k, R): one of each in ascending order, and for every column which it is."""
    n = columns.shape[1]
    if not len(columns) or not n:  # the empty context is one context
        return np.zeros(min(n, 1), np.int64), np.zeros(n, np.int64)
    bits = max(int(columns.max()).bit_length(), 1)
    word, used = columns[0].astype(np.uint64), bits
    for column in columns[1:]:
        if used + bits > 64:  # numbers of what has been read so far are shorter
            word, used = _numbered(word)[1].astype(np.uint64), n.bit_length()
        word, used = (word << np.uint64(bits)) | column.astype(np.uint64), used + bits
    return _numbered(word)


def _numbered(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with one index of each value, any, and the inverse; faster, as it need not be the first."""
    order = np.argsort(words)
    ordered = words[order]
    new = np.arange(len(words)) == 0
    new[1:] = ordered[1:] != ordered[:-1]
    where = np.empty(len(words), np.int64)
    where[order] = np.cumsum(new) - 1
    return order[new], where


def sums(where: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Add up whole numbers (n,) by the places that they belong to: (size,) int64."""
    found = np.zeros(size, np.int64)
    np.add.at(found, where, values)
    return found
