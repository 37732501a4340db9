"""Control: a coarser grid of the same tokens, whatever they show."""

from __future__ import annotations

from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import chosen_in_order
from tokenary.reduce.grid import medians, partition

CARD = Card(
    slug="reduce-grid",
    cls="ReduceGrid",
    room="reduce",
    title="A strided grid of image tokens",
    summary="keeps one image token of each cell of a coarse grid, whatever it shows",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class ReduceGrid(Reducer):
    """Keep the middle token of each of M cells.

    Parameters
    ----------
    keep : Budget
        How much stays; shared out evenly over views.
    """

    def __init__(self, keep: Budget = Budget(ratio=0.25)) -> None:  # noqa: B008 (frozen)
        super().__init__(keep)

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose by place."""
        chosen = medians(partition(x, keep, context), keep)
        return chosen_in_order(chosen.clamp_min(0), chosen >= 0, x.shape[1])
