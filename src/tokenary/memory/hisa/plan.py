"""How to search: how many blocks, which of them always, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Search = Literal["hierarchical", "flat", "blocks"]
Forced = Literal["beside", "inside"]


@dataclass(frozen=True)
class Plan:
    """How to search.

    Parameters
    ----------
    block : int
        Tokens a block, B.
    blocks : int
        Blocks that are searched for a query, m.
    ratio : float
        Search one of so many blocks instead; 0 for a fixed number.
    forced : {"beside", "inside"}
        Whether the first block and that of the query come on top of m, or count among them.
    search : {"hierarchical", "flat", "blocks"}
        Blocks, then tokens; all tokens, as DSA does; or blocks alone, all of whose tokens are read.
    """

    block: int
    blocks: int
    ratio: float = 0.0
    forced: Forced = "beside"
    search: Search = "hierarchical"

    def searched(self, current: Tensor, count: Tensor) -> Tensor:
        """Return m for queries whose own blocks are `current` and that read `count` tokens: (Q,) int64."""
        if self.search == "blocks":
            return (count // self.block).clamp(min=1)
        least = (count + self.block - 1) // self.block  # enough for the tokens
        if self.ratio:
            return ((current + 1) / self.ratio).ceil().long().maximum(least)
        return least.clamp(min=self.blocks)

    def searches_all(self, current: Tensor, count: Tensor) -> bool:
        """Whether every block is searched for all of these queries: then their means need not be looked at."""
        besides = current + (self.forced == "inside")  # the own block is always searched
        return self.search == "flat" or (
            self.search == "hierarchical" and bool((self.searched(current, count) >= besides).all())
        )


def evaluations(length: int, plan: Plan, count: int) -> int:
    """How many scores one query at the end of `length` tokens takes: means of blocks, then tokens; at most.

    Parameters
    ----------
    length : int
        Tokens, the query's included.
    plan : Plan
        How to search.
    count : int
        Tokens read.
    """
    n_blocks = math.ceil(length / plan.block)
    current, read = torch.tensor(n_blocks - 1), torch.tensor(count)
    if plan.searches_all(current, read):
        return length
    m = int(plan.searched(current, read))
    if plan.search == "blocks":
        return n_blocks - 1
    return n_blocks - 1 + min(length, (m + 2 * (plan.forced == "beside")) * plan.block)
