"""Merges of neighbouring tokens in one batch, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from tokenary.core.token_map import Segment
from tokenary.tokenize.dynamic_tokenization.pairs import Pairs
from tokenary.tokenize.dynamic_tokenization.rules import PairRules


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
        return tuple(self._undone([id], 0))

    def original(self) -> list[list[int]]:
        """Return the batch as it was."""
        return [self._undone(row, 0) for row in self.rows]

    def after(self, merges: int) -> Merged:
        """Return the batch as it was after the first so many merges."""
        rows = [self._undone(row, merges) for row in self.rows]
        return Merged(rows, self.base, self.pairs[:merges], self.lengths[: merges + 1])

    def _undone(self, row: Sequence[int], merges: int) -> list[int]:
        """Undo all merges but the first `merges`."""
        found, stack = [], list(reversed(row))
        while stack:
            id = stack.pop()
            if id < self.base + merges:
                found.append(id)
            else:
                left, right = self.pairs[id - self.base]
                stack += (right, left)
        return found

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Original tokens of every token."""
        merged: list[int] = []
        for pair in self.pairs:
            merged.append(sum(merged[id - self.base] if id >= self.base else 1 for id in pair))
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
    """
    base, lengths = rules.tokenizer.id_limit, [len(row) for row in rows]
    flat = np.fromiter((id for row in rows for id in row), np.int64, sum(lengths))
    ids, symbols = np.unique(flat, return_inverse=True)  # the first symbols; every merge adds one
    data = [rules.bytes_of(id) for id in ids.tolist()]
    pairs = Pairs(symbols, lengths, [rules.kind(token) for token in data])
    made: list[tuple[int, int]] = []
    curve = [len(flat)]
    while merges is None or len(made) < merges:
        found = pairs.best()
        if found is None:
            break
        left, right = found
        if not rules.allows(data[left], data[right]):
            continue  # it is not asked for again
        data.append(data[left] + data[right])
        made.append(found)
        curve.append(curve[-1] - pairs.merge(rules.kind(data[-1])))
    id_of = [*ids.tolist(), *range(base, base + len(made))]
    return Merged(
        [[id_of[symbol] for symbol in row if symbol >= 0] for row in pairs.rows()],
        base,
        [(id_of[left], id_of[right]) for left, right in made],
        curve,
    )


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
