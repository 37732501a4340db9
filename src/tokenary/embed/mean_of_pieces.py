"""Mean of pieces: the row of a new token is the mean of the rows of its old pieces (FVT, ReTok).

E'[t] = mean of E[p] over the pieces p that the old vocabulary cuts t into
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenary.core.card import Card
from tokenary.embed.base import Mixture, Transplant, pieces_of
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="mean-of-pieces",
    cls="MeanOfPieces",
    room="embed",
    slot="vocabulary",
    title="Mean of pieces (FVT, ReTok)",
    summary="a new token is the mean of its old pieces",
    paper="2402.09977",
    year=2024,
    baseline=True,
)


class MeanOfPieces(Transplant):
    """Averages the pieces of every new token."""

    def __init__(self) -> None:
        pass

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Weigh the pieces of each token alike."""
        return Mixture.of(pieces_of(source, target, new))
