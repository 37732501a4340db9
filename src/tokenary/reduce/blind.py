"""Control: no picture at all."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Reducer

CARD = Card(
    slug="blind",
    cls="Blind",
    room="reduce",
    title="No image tokens",
    summary="answers without the picture: what is left of an answer when nothing is seen",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class Blind(Reducer):
    """Keep nothing. What a model answers blind is the zero of retention."""

    def __init__(self) -> None:
        super().__init__(Budget(tokens=1))

    def count(self, num_tokens: int, context: Context) -> int:
        """Return 0."""
        return 0

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose none."""
        return Select(torch.empty(len(x), 0, dtype=torch.long, device=x.device), x.shape[1])
