"""Control: the newest tokens and, of the older ones, a uniformly random set for each key head.

Every token gets a random priority a head when it is first seen, and those of highest priority stay. So the older tokens
that are kept are at any time a uniform sample of *all* older tokens, not one that favours the latest reduction.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget, Layers
from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.core.token_map import Select
from tokenary.memory.base import KeepLayer, KeepPolicy, PerRow, recent_and_top

CARD = Card(
    slug="random",
    cls="RandomTokens",
    room="memory",
    title="Random older tokens",
    summary="keeps recent tokens and a random sample of the older ones: what any choice of key tokens must beat",
    slot="keep",
    requires=("kv-cache",),
    baseline=True,
)


class RandomTokens(KeepPolicy):
    """Keep the newest tokens and random older ones.

    Parameters
    ----------
    keep : Budget
        Tokens that stay; a share is of the prompt.
    recent : float
        Share of the budget that the newest tokens take, rounded down.
    layers : {"uniform", "pyramid"}
        How the budget is shared out over the layers.
    interval : int
        New tokens between two reductions.
    seed : int
        Of the priorities.
    """

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.6),  # noqa: B008 (frozen)
        recent: Annotated[float, Field(ge=0, le=1)] = 0.3,
        layers: Layers = "uniform",
        interval: Annotated[int, Field(ge=1)] = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(keep, layers, interval)
        self.recent, self.seed = recent, seed

    def layer(self, index: int) -> RandomLayer:
        """Return fresh state for one layer."""
        return RandomLayer(self)


class RandomLayer(KeepLayer):
    """Priorities of every token held in one layer, for each sequence of a batch."""

    policy: RandomTokens

    def __init__(self, policy: RandomTokens) -> None:
        super().__init__(policy)
        self._priorities: PerRow[Tensor] = PerRow()  # (Hkv, held after the last reduction) float32
        self._seen: PerRow[int] = PerRow()  # tokens of each sequence up to its last reduction

    @property
    def nbytes(self) -> int:
        """Bytes of the priorities."""
        return sum(priorities.nbytes for priorities in self._priorities.values())

    def choose(self, row: int, held: int, kept: int) -> Select:
        """Choose the newest tokens and the older ones of highest priority."""
        old = self._priorities.get(row, torch.empty(self.kv_heads, 0))
        before = self._seen.get(row, 0)
        seen = self._seen[row] = before + held - old.shape[1]
        # Drawn token by token from one stream, so that a priority belongs to the position alone.
        drawn = substream(self.policy.seed, "random", self.index).random((seen, self.kv_heads), dtype=np.float32)
        priorities = torch.cat([old, torch.from_numpy(drawn[before:].T)], dim=1)
        chosen = recent_and_top(priorities, kept, int(self.policy.recent * kept + 1e-9))
        self._priorities[row] = chosen.apply(priorities, dim=-1)
        return chosen
