"""Random rows: a new token gets the row of an old token drawn at random.

The control that knows nothing of a token's text; mean and covariance of the rows are those of the old table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.embed.base import Mixture, Transplant
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="random-rows",
    cls="RandomRows",
    room="embed",
    slot="vocabulary",
    title="Random rows",
    summary="a new token gets the row of a random old one",
    baseline=True,
)


class RandomRows(Transplant):
    """Draws a row for every new token.

    Parameters
    ----------
    seed : int
        The same seed draws the same rows.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Draw among the ordinary tokens."""
        ordinary = torch.tensor(sorted(source.id_of.values()))
        drawn = substream(self.seed, "random-rows").integers(0, len(ordinary), len(new))
        return Mixture(torch.arange(len(new)), ordinary[torch.from_numpy(drawn)], torch.ones(len(new)))
