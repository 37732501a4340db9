"""Control: random tokens, others for every picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import top

CARD = Card(
    slug="reduce-random",
    cls="ReduceRandom",
    room="reduce",
    title="Random image tokens",
    summary="keeps random image tokens: what any choice must beat",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class ReduceRandom(Reducer):
    """Keep random tokens; a picture gets the same ones in any batch.

    Parameters
    ----------
    keep : Budget
        How much stays.
    seed : int
        Of the draws; a measurement takes several.
    """

    needs = frozenset({"pixels"})

    def __init__(self, keep: Budget = Budget(ratio=0.25), seed: int = 0) -> None:  # noqa: B008 (frozen)
        super().__init__(keep)
        self.seed = seed

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose uniformly among the tokens that may be kept."""
        samples = context.samples or (0,) * len(x)
        drawn = [substream(self.seed, "reduce", sample, context.layer).random(x.shape[1]) for sample in samples]
        scores = torch.from_numpy(np.stack(drawn)).to(x.device)
        return top(scores, keep, context.allowed(x))
