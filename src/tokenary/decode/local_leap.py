"""LocalLeap: Local Determinism Propagation (2025, arXiv 2510.07081).

Near a prediction that is sure, its neighbours have mostly settled too, although they are less sure; the farther, the
less. So predictions above a strict threshold are anchors, and around them a relaxed threshold is enough::

    A = {i: c_i >= anchor}                       candidates of the block, anew in every pass
    N = union over a in A of [a - radius, a + radius]
    committed = {i: c_i >= (relaxed if i in N else anchor)} and the most confident candidate

The last one guarantees progress: never more passes than tokens. Anchors are candidates, so a neighbourhood may reach
over the border of a block, but nothing beyond is committed. With ``relaxed = anchor`` it is `Confidence` with one
threshold. How sure a model is differs from model to model; `calibrate` finds a threshold for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool1d

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.decode.denoise import Candidates, Unmasker, most_confident

CARD = Card(
    slug="local-leap",
    cls="LocalLeap",
    room="decode",
    slot="unmask",
    title="Accelerating Diffusion LLM Inference via Local Determinism Propagation",
    summary="fills moderately sure masks too where they stand near very sure ones; fewer passes",
    paper="2510.07081",
    year=2025,
    code="friedrichor/LocalLeap",
    requires=("diffusion",),
)


class LocalLeap(Unmasker):
    """Commit around anchors.

    Parameters
    ----------
    anchor : float
        Strict threshold, which makes an anchor.
    relaxed : float
        Threshold near an anchor; at most `anchor`.
    radius : int
        How many positions to both sides are near.
    block : int
        Tokens a block; 0 for one block.
    """

    def __init__(
        self,
        anchor: Annotated[float, Field(gt=0, le=1)] = 0.9,
        relaxed: Annotated[float, Field(gt=0, le=1)] = 0.75,
        radius: Annotated[int, Field(ge=0)] = 4,
        block: Annotated[int, Field(ge=0)] = 32,
    ) -> None:
        if relaxed > anchor:
            raise OptionError("relaxed", relaxed, f"at most anchor={anchor}")
        self.anchor, self.relaxed, self.radius, self.block = anchor, relaxed, radius, block

    def unmask(self, candidates: Candidates) -> Tensor:
        """Find the anchors and leap around them."""
        return leap(candidates.confidence, self.anchor, self.relaxed, self.radius)


def leap(confidence: Tensor, anchor: float, relaxed: float, radius: int) -> Tensor:
    """Choose what is committed.

    Parameters
    ----------
    confidence : Tensor
        (B, T) float64, -inf where there is no candidate.
    anchor, relaxed, radius
        As the options of `LocalLeap`.

    Returns
    -------
    Tensor
        (B, T) bool, at least one candidate a row.
    """
    anchors = confidence >= anchor
    reach = min(radius, confidence.shape[-1])
    near = max_pool1d(anchors.float()[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
    return anchors | (near & (confidence >= relaxed)) | most_confident(confidence)


def calibrate(confidences: Sequence[Tensor], right: Sequence[Tensor], precision: float = 0.95) -> float:
    """Find the lowest strict threshold at which predictions are right often enough on this model.

    Parameters
    ----------
    confidences : sequence of Tensor
        (n,) float, confidences of predictions at masked positions of known text.
    right : sequence of Tensor
        (n,) bool, whether the prediction was the text's token (or the one that slow decoding ends with).
    precision : float
        Share of right ones, over everything at or above the threshold, that is demanded; in (0, 1].

    Returns
    -------
    float
        A value for `anchor`; 1 if none is good enough.

    Raises
    ------
    OptionError
        A precision out of range.
    """
    if not 0 < precision <= 1:
        raise OptionError("precision", precision, "a number above 0 and at most 1")
    values, order = torch.cat(list(confidences)).double().sort(descending=True)
    hits = torch.cat(list(right))[order].double().cumsum(0)
    share = hits / torch.arange(1, len(hits) + 1)
    last = torch.ones_like(values, dtype=torch.bool)
    last[:-1] = values[:-1] > values[1:]  # a threshold takes all of its equals
    good = values[last & (share >= precision)]
    return float(good.min()) if len(good) else 1.0
