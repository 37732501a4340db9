"""Confidence decoding: the usual schedule of masked diffusion, and the baseline of every other unmasker.

A number of tokens a pass, most confident first (Nie et al. 2025, arXiv 2502.09992), and beside them every prediction
that is surer than one threshold for all (the parallel rule of Fast-dLLM)::

    committed = the `tokens` most confident candidates, and every i with c_i >= threshold

The defaults commit one token a pass. Other orders are controls: ``random`` ranks by random numbers, ``left`` from left
to right.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.decode.denoise import Candidates, Unmasker

CARD = Card(
    slug="confidence",
    cls="Confidence",
    room="decode",
    slot="unmask",
    title="Confidence decoding",
    summary="fills the most confident masks, a fixed number a pass or all above a threshold",
    requires=("diffusion",),
    baseline=True,
)


class Confidence(Unmasker):
    """Commit the most confident predictions.

    Parameters
    ----------
    threshold : float
        Predictions at least this probable are committed too; 1 leaves it to `tokens`.
    tokens : int
        Committed a pass at least, as far as the block has so many masks.
    block : int
        Tokens a block; 0 for one block.
    order : {"confidence", "random", "left"}
        What ranks the candidates.
    seed : int
        Of the random order.
    """

    def __init__(
        self,
        threshold: Annotated[float, Field(gt=0, le=1)] = 1.0,
        tokens: Annotated[int, Field(ge=1)] = 1,
        block: Annotated[int, Field(ge=0)] = 32,
        order: Literal["confidence", "random", "left"] = "confidence",
        seed: int = 0,
    ) -> None:
        self.threshold, self.tokens, self.block, self.order, self.seed = threshold, tokens, block, order, seed

    def unmask(self, candidates: Candidates) -> Tensor:
        """Rank the candidates and take the first ones."""
        confidence, size = candidates.confidence, candidates.confidence.shape[-1]
        rank = confidence
        if self.order == "random":
            numbers = [substream(self.seed, "confidence", row, candidates.step).random(size) for row in candidates.rows]
            rank = torch.stack([torch.from_numpy(n) for n in numbers]).to(confidence.device)
        elif self.order == "left":
            rank = torch.arange(size, 0, -1, device=confidence.device).double().expand_as(confidence)
        return fill(confidence, rank.masked_fill(~candidates.eligible, float("-inf")), self.threshold, self.tokens)


def fill(confidence: Tensor, rank: Tensor, threshold: float, tokens: int) -> Tensor:
    """Choose the `tokens` highest of `rank`, and whatever reaches the threshold.

    Parameters
    ----------
    confidence, rank : Tensor
        (B, T) float64, -inf where there is no candidate.
    threshold : float
        1 adds nothing: a probability that is rounded to 1 is no reason to hurry.
    tokens : int
        At least 1.

    Returns
    -------
    Tensor
        (B, T) bool, a part of the candidates.
    """
    best = rank.topk(min(tokens, rank.shape[-1])).indices
    chosen = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, best, True)
    if threshold < 1:
        chosen |= confidence >= threshold
    return chosen & confidence.isfinite()
