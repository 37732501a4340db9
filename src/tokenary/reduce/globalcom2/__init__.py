"""GlobalCom2 (Liu et al. 2025, arXiv 2501.05179).

A large picture is seen as a thumbnail and crops. A crop cannot know whether it matters; the thumbnail does. Scores are
products of the class token's query and the keys of patches in the last layer, scaled, averaged over heads, before the
softmax. With a ratio R, of n crops with n_i tokens each:

    thumbnail   the floor(N R) largest scores
    t_i         sum of the thumbnail's scores in the rectangle that crop i shows
    r_i         min(1, R (1 + s_i - 1/n)),  s = softmax((t - max t) / tau)           R on average, R (1 - 1/n) at least
    g           local / |local| + global / |global|, within a crop; global is the thumbnail's map, resized (bilinear) to
                the picture's area on the large grid
    crop i      the floor(n_i r_i) largest g

P = permute_raster blockdiag(P_0, P_1, ..., P_n), each P_i floor(n_i r_i) x N with one 1 a row; every token stands for
itself (sizes 1). The plan is the block diagonal. The adapter does the permutation, row by row over all crops of a grid
row, and ends every row, also an empty one, with its newline: those count in what is kept, not in R. What is kept has
positions without gaps, and all layers hold the same tokens.

Padding that keeps a picture's proportions is no candidate: `unpadded` says what is left of the large grid,
`valid_patches` is that for ``Context.valid``. A picture of one view stays as it is. The code that was released reads
the thumbnail by descending scores; here it is read in raster order, as the adapter lays it out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.choose import mask_to_select
from tokenary.reduce.globalcom2.guidance import crop_ratios, crop_scores, unpadded, valid_patches

__all__ = ["GlobalCom2", "crop_ratios", "crop_scores", "unpadded", "valid_patches"]

CARD = Card(
    slug="globalcom2",
    cls="GlobalCom2",
    room="reduce",
    title="Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration",
    summary="lets the thumbnail of a large picture say how many tokens each crop keeps, and help to say which",
    slot="reduce",
    paper="2501.05179",
    year=2025,
    code="xuyang-liu16/GlobalCom2",
    requires=("images",),
)


class GlobalCom2(Reducer):
    """Keep of each crop as many tokens as the thumbnail says, and those that it and the crop look at.

    Parameters
    ----------
    keep : Budget
        How much stays of a picture of several views: as a share, R.
    score : {"logit", "prob"}
        Products as they are (released), or behind the softmax; of those `tau` of 10 makes ratios equal.
    tau : float
        Temperature of the ratios.
    ratios : {"guided", "uniform"}
        Whether the thumbnail says how many tokens a crop keeps; or R for each.
    choice : {"mixed", "local"}
        Whether the thumbnail's scores are added to a crop's own.
    """

    needs = frozenset({"queries", "keys"})
    exact = False

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        score: Literal["logit", "prob"] = "logit",
        tau: Annotated[float, Field(gt=0)] = 10.0,
        ratios: Literal["guided", "uniform"] = "guided",
        choice: Literal["mixed", "local"] = "mixed",
    ) -> None:
        super().__init__(keep)
        self.score, self.tau, self.ratios, self.choice = score, tau, ratios, choice

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens; see `Reducer.attach`."""
        if Point.stage_of(at or self.at) != "encoder":
            raise OptionError("at", str(at), "encoder: only there is a thumbnail known beside its crops")
        return super().attach(model, at, **options)

    def count(self, num_tokens: int, context: Context) -> int:
        """Return how many tokens stay at most; of one view all."""
        if context.layout != "anyres":
            return num_tokens
        kept = super().count(num_tokens, context)
        if kept < context.views:
            raise OptionError("keep", str(self.keep), f"a token for each of the {context.views} views")
        return kept

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose in the thumbnail, share the rest out over crops, and choose there."""
        allowed = context.allowed(x)
        if context.layout != "anyres" or keep >= x.shape[1]:
            return mask_to_select(allowed)
        scores = context.by_picture(self._scores(context)).double().unflatten(1, (context.views, -1))  # (B, V, n)
        there = allowed.unflatten(1, (context.views, -1))
        ratio = keep / x.shape[1]
        thumbnail, local = scores[:, 0].unflatten(1, context.grid), scores[:, 1:]
        ratios = torch.full(local.shape[:2], ratio, dtype=torch.float64, device=x.device)
        if self.ratios == "guided":
            ratios = crop_ratios(thumbnail, context.crops, ratio, self.tau)
        mixed = local
        if self.choice == "mixed":
            mixed = _unit(local, there[:, 1:]) + _unit(
                crop_scores(thumbnail, context.crops, there[:, 1:]), there[:, 1:]
            )
        ratios = torch.cat([ratios.new_full((len(x), 1), ratio), ratios], dim=1)
        counts = (there.sum(-1) * ratios + 1e-9).floor().long()  # (B, V)
        return mask_to_select(_largest(torch.cat([scores[:, :1], mixed], dim=1), counts, there).flatten(1))

    def _scores(self, context: Context) -> Tensor:
        """Return what the class token thinks of each patch, (B V, n)."""
        if context.span is None or context.span[0] == 0:
            raise UnsupportedModelError("globalcom2 asks the class token of an encoder, and this one has none")
        first = slice(0, 1)
        found = context.attention_logits(rows=first) if self.score == "logit" else context.attention(rows=first)
        return context.image(found.mean(1)[:, 0], 1)


def _unit(scores: Tensor, there: Tensor) -> Tensor:
    """Scale the scores (..., N) of each crop to length 1, over the tokens that are there."""
    scores = scores.masked_fill(~there, 0)
    return scores / scores.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _largest(scores: Tensor, counts: Tensor, there: Tensor) -> Tensor:
    """Say which are the ``counts`` (B, V) largest scores (B, V, N) of each view; of equal ones the first."""
    order = scores.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) < counts[..., None]
