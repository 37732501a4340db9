"""Control: average pooling over the cells of a coarse grid."""

from __future__ import annotations

from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.grid import partition
from tokenary.reduce.mix import segments

CARD = Card(
    slug="reduce-pool",
    cls="ReducePool",
    room="reduce",
    title="Average pooling of image tokens",
    summary="averages image tokens over the cells of a coarse grid, whatever they show",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class ReducePool(Reducer):
    """Average the tokens of each of M cells.

    Parameters
    ----------
    keep : Budget
        How much stays; shared out evenly over views.
    proportional : bool
        Whether later layers weigh each mean by the number of its tokens. Plain pooling does not.
    """

    kind = "merge"

    def __init__(self, keep: Budget = Budget(ratio=0.25), proportional: bool = False) -> None:  # noqa: B008 (frozen)
        super().__init__(keep)
        self.proportional = proportional

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Average by place."""
        return segments(partition(x, keep, context), keep, context.sizes)
