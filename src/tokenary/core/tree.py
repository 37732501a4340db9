"""Draft trees: candidate continuations of a batch of sequences that one pass of the model scores together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@functools.lru_cache(maxsize=256)
def _structure(parents: bytes, batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (B, W) and ancestor-or-self relation (B, W, W) of trees given by their parents."""
    table = np.frombuffer(parents, np.int64).reshape(batch, width)
    depth = np.zeros((batch, width), np.int64)
    ancestors = np.zeros((batch, width, width), bool)
    rows = np.arange(batch)
    for node in range(width):
        parent = table[:, node]
        linked = parent >= 0
        depth[:, node] = np.where(linked, depth[rows, parent] + 1, 0)
        ancestors[:, node] = ancestors[rows, parent] & linked[:, None]
        ancestors[:, node, node] = True
    return depth, ancestors


@dataclass(frozen=True)
class TokenTree:
    """A batch of draft trees, one a sequence. Node 0 is the root: the newest token, not yet seen by the model.

    Parents come before children and likelier nodes before less likely ones, so that the first n nodes are again
    trees. A ragged batch is padded with nodes of parent -1 at the end.

    Parameters
    ----------
    ids : np.ndarray
        Token of each node, int64, (B, W).
    parents : np.ndarray
        Index of each node's parent, int64, (B, W); -1 for the root and for padding.
    """

    ids: np.ndarray
    parents: np.ndarray

    @classmethod
    def roots(cls, tokens: Sequence[int]) -> TokenTree:
        """Trees without a draft: the pass of ordinary decoding."""
        ids = np.asarray(tokens, np.int64)[:, None]
        return cls(ids, np.full_like(ids, -1))

    @classmethod
    def chains(cls, tokens: Sequence[Sequence[int]]) -> TokenTree:
        """Trees with one branch; ``tokens[b]`` is the root followed by the draft."""
        return cls.stack([(chain, range(-1, len(chain) - 1)) for chain in tokens])

    @classmethod
    def stack(cls, trees: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenTree:
        """Batch trees of different sizes, each given as (ids, parents)."""
        width = max(len(ids) for ids, _ in trees)
        batch_ids = np.zeros((len(trees), width), np.int64)
        batch_parents = np.full((len(trees), width), -1, np.int64)
        for row, (ids, parents) in enumerate(trees):
            batch_ids[row, : len(ids)] = ids
            batch_parents[row, : len(ids)] = parents
        return cls(batch_ids, batch_parents)

    @property
    def width(self) -> int:
        """Nodes a tree, padding included."""
        return self.ids.shape[1]

    @property
    def sizes(self) -> np.ndarray:
        """Real nodes of each tree, (B,)."""
        return 1 + (self.parents[:, 1:] >= 0).sum(1)

    @property
    def depth(self) -> np.ndarray:
        """Distance of each node from its root, (B, W)."""
        return _structure(self.parents.tobytes(), *self.parents.shape)[0]

    @property
    def ancestors(self) -> np.ndarray:
        """Whether node j is node i or above it, (B, W, W) over i, j."""
        return _structure(self.parents.tobytes(), *self.parents.shape)[1]

    def child(self, row: int, node: int, token: int) -> int:
        """Return the first child of `node` that holds `token`, or -1."""
        found = np.flatnonzero((self.parents[row] == node) & (self.ids[row] == token))
        return int(found[0]) if len(found) else -1
