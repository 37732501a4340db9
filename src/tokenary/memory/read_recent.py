"""Control: every query reads the first few tokens and the newest (Xiao et al. 2023, arXiv 2309.17453), nothing freed.

Tokens keep their positions here. With positions counted anew it is ``token-select`` that chooses no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.hf.cache import TokenLayer
from tokenary.memory.read_base import PartialLayer, PartialRead, Seen

CARD = Card(
    slug="read-recent",
    cls="ReadRecent",
    room="memory",
    title="Reading attention sinks and a window",
    summary="every query reads the first few tokens and the newest: what any choice of what to read must beat",
    slot="read",
    paper="2309.17453",
    year=2023,
    requires=("kv-cache",),
    baseline=True,
)


class ReadRecent(PartialRead):
    """Read the first and the newest tokens.

    Parameters
    ----------
    read : Budget
        Tokens that a query reads; a share is of what it may see.
    sinks : int
        How many of them are the first of the text; 0 for a plain window.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"read": 8, "sinks": 2}

    def __init__(
        self,
        read: Budget = Budget(tokens=256),  # noqa: B008 (frozen)
        sinks: Annotated[int, Field(ge=0)] = 4,
    ) -> None:
        super().__init__(read)
        self.sinks = sinks

    def layer(self, index: int) -> RecentReadLayer:
        """Return fresh state for one layer."""
        return RecentReadLayer(self)


class RecentReadLayer(PartialLayer):
    """Nothing to remember."""

    policy: ReadRecent

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose the same tokens for every head."""
        sinks = count.clamp(max=self.policy.sinks)
        window = seen.total - (count - sinks)
        chosen = (seen.ranks < sinks[..., None]) | (seen.ranks >= window[..., None])
        return (chosen & seen.slots)[:, None]
