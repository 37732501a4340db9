"""Control: the first few tokens and the newest, as StreamingLLM keeps them (Xiao et al. 2023, arXiv 2309.17453).

Models put much attention on their first tokens whatever these say (attention sinks), so that a plain window fails once
they are gone. Unlike the paper, tokens keep their original positions here, as under every other policy.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from tokenary.core.budget import Budget, Layers
from tokenary.core.card import Card
from tokenary.core.token_map import Select
from tokenary.memory.base import KeepLayer, KeepPolicy

CARD = Card(
    slug="recent",
    cls="RecentTokens",
    room="memory",
    title="Attention sinks and a window",
    summary="keeps the first few tokens and the newest: what any choice of tokens must beat",
    slot="keep",
    paper="2309.17453",
    year=2023,
    requires=("kv-cache",),
    baseline=True,
)


class RecentTokens(KeepPolicy):
    """Keep the first and the newest tokens.

    Parameters
    ----------
    keep : Budget
        Tokens that stay; a share is of the prompt.
    sinks : int
        How many of them are the first of the text; 0 for a plain window.
    layers : {"uniform", "pyramid"}
        How the budget is shared out over the layers.
    interval : int
        New tokens between two reductions.
    """

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.6),  # noqa: B008 (frozen)
        sinks: Annotated[int, Field(ge=0)] = 4,
        layers: Layers = "uniform",
        interval: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        super().__init__(keep, layers, interval)
        self.sinks = sinks

    def layer(self, index: int) -> RecentLayer:
        """Return fresh state for one layer."""
        return RecentLayer(self)


class RecentLayer(KeepLayer):
    """Nothing to remember: the tokens held are in the order of the text."""

    policy: RecentTokens

    def choose(self, row: int, held: int, kept: int) -> Select:
        """Choose the same tokens for every head."""
        sinks = min(self.policy.sinks, kept)
        newest = torch.arange(held - (kept - sinks), held)
        return Select(torch.cat([torch.arange(sinks), newest]), num_tokens=held)
