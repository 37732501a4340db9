"""Control: every query reads the newest tokens and, of the older ones, a random set for each key head.

Every token has a random priority a head, and those of highest priority are read, by every query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.hf.cache import TokenLayer
from tokenary.memory.read_base import PartialLayer, PartialRead, Seen, highest

CARD = Card(
    slug="read-random",
    cls="ReadRandom",
    room="memory",
    title="Reading random tokens",
    summary="every query reads recent tokens and random older ones: what any choice of what to read must beat",
    slot="read",
    requires=("kv-cache",),
    baseline=True,
)


class ReadRandom(PartialRead):
    """Read the newest tokens and random older ones.

    Parameters
    ----------
    read : Budget
        Tokens that a query reads; a share is of what it may see.
    recent : float
        Share of them that the newest tokens take, rounded down.
    seed : int
        Of the priorities.
    """

    def __init__(
        self,
        read: Budget = Budget(tokens=256),  # noqa: B008 (frozen)
        recent: Annotated[float, Field(ge=0, le=1)] = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__(read)
        self.recent, self.seed = recent, seed

    def layer(self, index: int) -> RandomReadLayer:
        """Return fresh state for one layer."""
        return RandomReadLayer(self)


class RandomReadLayer(PartialLayer):
    """Priorities of ranks, the same for every sequence."""

    policy: ReadRandom

    def __init__(self, policy: ReadRandom) -> None:
        super().__init__(policy)
        self._priorities = torch.empty(0, 0)  # (Hkv, ranks) float32

    @property
    def nbytes(self) -> int:
        """Bytes of the priorities."""
        return self._priorities.nbytes

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose the newest tokens and the older ones of highest priority."""
        newest = (count * self.policy.recent + 1e-9).long()
        recent = seen.slots & (seen.ranks >= (seen.total - newest)[..., None])  # (B, W, N)
        priorities = self._upto(key.shape[2], key.shape[1]).to(key.device)[:, seen.ranks.clamp(min=0)]
        older = (seen.slots & ~recent)[:, None]
        scores = priorities.transpose(0, 1).masked_fill(~older, float("-inf"))  # (B, Hkv, W, N)
        left = (count - newest)[:, None].expand(scores.shape[:-1])
        return highest(scores, left) | recent[:, None]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget the priorities when no sequence is left."""
        if not rows:
            self._priorities = torch.empty(0, 0)

    def _upto(self, ranks: int, kv_heads: int) -> Tensor:
        """Draw priorities token by token from one stream, so that one belongs to the rank alone."""
        if self._priorities.shape[1] < ranks:
            stream = substream(self.policy.seed, "read-random", self.index)
            drawn = stream.random((2 * ranks, kv_heads), dtype=np.float32)
            self._priorities = torch.from_numpy(drawn.T.copy())
        return self._priorities
