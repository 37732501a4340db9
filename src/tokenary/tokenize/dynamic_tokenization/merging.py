"""Merges of neighbouring tokens in one batch, and what comes out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numba
import numpy as np
import torch

from tokenary.core.errors import InputError
from tokenary.core.token_map import Segment
from tokenary.tokenize.dynamic_tokenization.pairs import Pairs
from tokenary.tokenize.dynamic_tokenization.rules import NEVER, PairRules


@dataclass(frozen=True)
class Merged:
    """A batch after its merges.

    Attributes
    ----------
    rows : list of list of int
        Tokens of each sequence; ids from `base` on are merged ones.
    base : int
        First id of a merged token.
    pairs : list of (int, int)
        The merges, in order; that of id ``base + i`` is ``pairs[i]``.
    lengths : list of int
        The curve: tokens of the batch before the first merge, and after each.
    """

    rows: list[list[int]]
    base: int
    pairs: list[tuple[int, int]]
    lengths: list[int]

    def parts(self, id: int) -> tuple[int, ...]:
        """Return the original tokens that a token is made of."""
        found, _ = _undone(np.array([id]), self._pairs, self.base, self.base, self._widths)
        return tuple(found.tolist())

    def original(self) -> list[list[int]]:
        """Return the batch as it was."""
        return self._rows(0)

    def after(self, merges: int) -> Merged:
        """Return the batch as it was after the first so many merges."""
        return Merged(self._rows(merges), self.base, self.pairs[:merges], self.lengths[: merges + 1])

    def _rows(self, merges: int) -> list[list[int]]:
        """Undo all merges but the first `merges`."""
        lengths, first = [len(row) for row in self.rows], self.base + merges
        flat = np.fromiter(itertools.chain.from_iterable(self.rows), np.int64, sum(lengths))
        found, places = _undone(flat, self._pairs, self.base, first, _widths(self._pairs, self.base, first))
        return _cut(found, places[np.cumsum([0, *lengths])])

    @cached_property
    def _pairs(self) -> np.ndarray:
        return np.array(self.pairs, np.int64).reshape(-1, 2)

    @cached_property
    def _widths(self) -> np.ndarray:
        return _widths(self._pairs, self.base, self.base)

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Original tokens of every token."""
        merged = self._widths.tolist()
        return [[merged[id - self.base] if id >= self.base else 1 for id in row] for row in self.rows]

    def first(self, values: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Carry labels or word ids over: a merged token gets that of its first part."""
        starts = [np.cumsum([0, *sizes])[:-1].tolist() for sizes in self.sizes]
        return [[row[at] for at in where] for row, where in zip(values, starts, strict=True)]

    def token_map(self, side: Literal["left", "right"] = "left") -> Segment:
        """Return the map (B, M, N) that averages the parts of every token; both batches are padded on `side`."""
        n, m = max(map(sum, self.sizes), default=0), max(map(len, self.sizes), default=0)
        assign = np.full((len(self.rows), n), -1)
        for into, sizes in zip(assign, self.sizes, strict=True):
            groups = np.repeat(np.arange(len(sizes)), sizes)
            if side == "left":
                into[n - len(groups) :] = groups + (m - len(sizes))
            else:
                into[: len(groups)] = groups
        return Segment(torch.from_numpy(assign), m)


def merge_batch(rows: Sequence[Sequence[int]], rules: PairRules, merges: int | None = None) -> Merged:
    """Merge the most frequent neighbours of a batch, again and again.

    Of equally frequent pairs the one that stands first in the batch is merged; occurrences are replaced from left to
    right, so that those that overlap are not all replaced.

    Parameters
    ----------
    rows : sequence of sequences of int
        Token ids, special tokens included.
    rules : PairRules
        Which pairs may merge.
    merges : int, optional
        Most merges; without it, until no pair is left that may merge.

    Raises
    ------
    InputError
        An id that the tokenizer does not have would be taken for a merged token.
    """
    base, lengths = rules.tokenizer.id_limit, [len(row) for row in rows]
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, sum(lengths))
    if len(flat) and flat.max() >= base:
        raise InputError(f"{rules.tokenizer.name} has no token {flat.max()}: its ids end at {base - 1}")
    ids, symbols = np.unique(flat, return_inverse=True)  # the first symbols; every merge adds one
    data = [rules.bytes_of(id) for id in ids.tolist()]
    text = b"".join([data[symbol] for symbol in symbols.tolist()])
    pairs = Pairs(symbols, lengths, [rules.kind(token) for token in data], [len(token) for token in data], rules.asks)
    most, answer = len(flat) if merges is None else merges, NEVER
    while (question := pairs.run(most, answer))[2]:
        begin, border, end = question
        answer = rules.join(text[begin:border], text[border:end])
    lefts, rights, times = pairs.made.T
    id_of = np.concatenate([ids, base + np.arange(len(times))])
    kept = pairs.symbols >= 0
    places = np.cumsum([0, *lengths])
    return Merged(
        _cut(id_of[pairs.symbols[kept]], np.concatenate([[0], np.cumsum(kept)])[places]),
        base,
        list(zip(id_of[lefts].tolist(), id_of[rights].tolist(), strict=True)),
        (len(flat) - np.concatenate([[0], np.cumsum(times)])).tolist(),
    )


def _cut(flat: np.ndarray, places: np.ndarray) -> list[list[int]]:
    """Cut one row into many, at ascending places."""
    ids = flat.tolist()
    return [ids[start:stop] for start, stop in itertools.pairwise(places.tolist())]


@numba.njit(cache=True, boundscheck=True)
def _widths(pairs: np.ndarray, base: int, first: int) -> np.ndarray:
    """Tokens that every merged one becomes where all from id `first` on are taken apart: (M,) of pairs (M, 2)."""
    widths = np.ones(len(pairs), np.int64)
    for n in range(first - base, len(pairs)):
        widths[n] = 0
        for part in pairs[n]:
            widths[n] += widths[part - base] if part >= base else 1
    return widths


@numba.njit(cache=True, boundscheck=True)
def _undone(
    ids: np.ndarray, pairs: np.ndarray, base: int, first: int, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take ids from `first` on apart; return what comes out, and where each id begins there and all end."""
    places = np.zeros(len(ids) + 1, np.int64)
    for n in range(len(ids)):
        places[n + 1] = places[n] + (widths[ids[n] - base] if ids[n] >= base else 1)
    found = np.empty(places[-1], np.int64)
    found[places[:-1]] = ids
    for at in range(len(found)):
        while found[at] >= first:
            left, right = pairs[found[at] - base]
            found[at] = left
            found[at + (widths[left - base] if left >= base else 1)] = right
    return found, places


def merges_for(lengths: Sequence[int], share: float) -> int:
    """Return the fewest merges that reach a share of the reachable reduction.

    Parameters
    ----------
    lengths : sequence of int
        The curve of a batch that was merged to its limit (`Merged.lengths`).
    share : float
        0 for no merge, 1 for the limit.
    """
    wanted = lengths[0] - share * (lengths[0] - lengths[-1])
    return next(m for m, length in enumerate(lengths) if length <= wanted + 1e-9)
