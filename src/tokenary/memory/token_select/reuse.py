"""The selection cache: a choice is kept while the queries that follow are like the one that made it.

Whether a query chooses anew depends on the choices before it in its own text. In a pass over a draft tree that is the
path from the root, so every node gets an entry, and the one of the last node that was accepted goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenary.hf.cache import TokenLayer
from tokenary.memory.base import PerRow, RowState


@dataclass
class Entry:
    """One choice.

    Parameters
    ----------
    fingerprint : Tensor
        The query that made it, all heads in a row, (H * D,).
    ranks : Tensor or None
        What it chose, (k,) int64; None until it was made.
    """

    fingerprint: Tensor
    ranks: Tensor | None = None


@dataclass(frozen=True)
class _Pass:
    """One sequence's part of a pass whose outcome is not known yet."""

    before: int  # tokens committed before it
    parents: Sequence[int]
    keys: Tensor  # of the nodes, in the first head, (W, D): by them an accepted node is known again
    entries: list[Entry | None]


class SelectionCache(RowState):
    """The last choice of every sequence of a batch, in one layer.

    Parameters
    ----------
    threshold : float
        Cosine from which on a choice is kept.

    Attributes
    ----------
    chosen, reused : int
        Queries that chose anew, and that kept a choice.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.chosen = self.reused = 0
        self._last: PerRow[Entry | None] = PerRow()
        self._passes: PerRow[_Pass] = PerRow()

    @property
    def nbytes(self) -> int:
        """Bytes of the choices that are kept."""
        kept = [entry for entry in self._last.values() if entry is not None]
        return sum(e.fingerprint.nbytes + (0 if e.ranks is None else e.ranks.nbytes) for e in kept)

    def settle(self, layer: TokenLayer) -> None:
        """Find out what became of the last pass: the entry of the newest accepted node goes on."""
        for row, waiting in self._passes.items():
            taken = layer.committed[row] - waiting.before
            if taken:
                assert layer.storage is not None
                node = _walk(waiting, layer.storage[0, row, 0, waiting.before : waiting.before + taken])
                self._last[row] = None if node is None else waiting.entries[node]
        self._passes.clear()

    def entry(self, base: Entry | None, fingerprint: Tensor) -> Entry:
        """Return the entry of a query that follows `base`: the same, or a new one that has yet to choose."""
        if base is not None and float(cosine_similarity(base.fingerprint, fingerprint, dim=0)) >= self.threshold:
            self.reused += 1
            return base
        self.chosen += 1
        return Entry(fingerprint)

    def last(self, row: int) -> Entry | None:
        """Return the newest entry of a sequence."""
        return self._last.get(row)

    def keep(self, row: int, entry: Entry | None) -> None:
        """Make an entry the newest of a sequence, at once: in a prompt nothing is rolled back."""
        self._last[row] = entry

    def plan(self, layer: TokenLayer, row: int, fingerprints: Tensor, asks: Sequence[bool], keys: Tensor) -> list:
        """Give every node of a pass its entry.

        Parameters
        ----------
        layer : TokenLayer
            The cache.
        row : int
            Which sequence.
        fingerprints : Tensor
            (W, H * D).
        asks : sequence of bool
            Which nodes need a choice at all; the others pass on what they got.
        keys : Tensor
            (W, D).
        """
        ancestors = layer.shared[0].ancestors
        parents = [n - 1 for n in range(len(asks))] if ancestors is None else parents_of(ancestors[row])
        entries: list[Entry | None] = []
        for node, parent in enumerate(parents):
            base = self.last(row) if parent < 0 else entries[parent]
            entries.append(self.entry(base, fingerprints[node]) if asks[node] else base)
        self._passes[row] = _Pass(layer.committed[row], parents, keys.clone(), entries)
        return entries


def parents_of(ancestors: Tensor) -> list[int]:
    """Return the parent of each node from the ancestor-or-self relation (W, W) bool; -1 for a root."""
    width = ancestors.shape[0]
    before = ancestors & torch.ones(width, width, dtype=torch.bool, device=ancestors.device).tril(-1)
    places = torch.arange(width, device=ancestors.device).expand(width, -1)
    return torch.where(before, places, -1).amax(1).tolist()  # parents stand before children: the last is the nearest


def _walk(waiting: _Pass, taken: Tensor) -> int | None:
    """Follow the accepted keys (A, D) from the root; return the last node, None if they lead nowhere."""
    node = -1
    for key in taken:
        children = [child for child, parent in enumerate(waiting.parents) if parent == node]
        found = [child for child in children if torch.equal(waiting.keys[child], key)]
        if not found:
            return None
        node = found[0]
    return node
