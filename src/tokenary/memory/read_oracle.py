"""Control: every query head reads the tokens with its largest logits, which takes looking at all of them.

What a cheap choice of as many tokens tries to find. It saves nothing but the values that are not read.
"""

from __future__ import annotations

from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.hf.cache import TokenLayer
from tokenary.memory.read_base import PartialLayer, PartialRead, Seen, highest

CARD = Card(
    slug="read-oracle",
    cls="ReadOracle",
    room="memory",
    title="Reading the tokens with the largest logits",
    summary="every query head reads its true top tokens, found by looking at all: the best that a choice can find",
    slot="read",
    requires=("kv-cache",),
    baseline=True,
)


class ReadOracle(PartialRead):
    """Read the tokens with the largest logits.

    Parameters
    ----------
    read : Budget
        Tokens that a query head reads; a share is of what it may see.
    """

    def __init__(self, read: Budget = Budget(tokens=256)) -> None:  # noqa: B008 (frozen)
        super().__init__(read)

    def layer(self, index: int) -> OracleLayer:
        """Return fresh state for one layer."""
        return OracleLayer(self)


class OracleLayer(PartialLayer):
    """Nothing to remember."""

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose for every query head."""
        return highest_logits(query, key, seen, count)


def highest_logits(query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
    """Choose the tokens with the largest dot products.

    Parameters
    ----------
    query, key : Tensor
        (B, Hq, W, U) and (B, Hkv, N, U).
    seen, count
        As in `PartialLayer.choose`.

    Returns
    -------
    Tensor
        (B, Hq, W, N) bool.
    """
    batch, heads, width, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)
    scores = folded.matmul(key.transpose(2, 3)).float().view(batch, heads, width, -1)
    scores = scores.masked_fill_(~seen.slots[:, None], float("-inf"))
    return highest(scores, count[:, None].expand(-1, heads, -1))
