"""HiPrune (2025, arXiv 2508.00553).

Inside a ViT, tokens of middle layers attend to objects, those of deep layers to scattered tokens that sum up the whole.
A token's score in a layer is the attention it gets, the mean over heads and over all queries (a class token's too):

    anchors    k = round(M alpha / 5) tokens with the largest score in a middle layer, the object layer
    buffers    the four neighbours of each anchor, which mend the noise of its attention
    registers  of all others, the largest scores in the deep layer, whose features are read, until there are M

    P is M x N with one 1 a row, tokens in their order; every token stands for itself (sizes 1). Kept tokens are counted
    anew (LLaVA) or keep the numbers that they had (Qwen2.5-VL): ``positions``. All layers behind hold M tokens.

A picture of several views (AnyRes) has M / V tokens in each, rounded down; newlines are added behind the choice, and
kept, by the adapter. With M alpha / 5 at most 1/2 there are no anchors (M up to 25 at alpha 0.1), and the deep layer
alone chooses; ``min_anchors`` says otherwise. The paper's object layer is 9 of 24; `dispersion` and `plateau_end` find
that of another encoder.

The released code lets the left and right neighbours of an anchor at the edge lie in the next row, and moves those
outside of the picture to its first or last token: ``wrap``. Windowed attention and merged patches (its Qwen2.5-VL path)
belong to encoders that do not stand here.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.choose import mask_to_select
from tokenary.reduce.hiprune.choice import dispersion, hierarchical, neighbours, plateau_end, received

__all__ = ["HiPrune", "dispersion", "hierarchical", "neighbours", "plateau_end", "received"]

CARD = Card(
    slug="hiprune",
    cls="HiPrune",
    room="reduce",
    title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    summary="keeps what a middle layer of the encoder attends to, what lies beside it, and what a deep one attends to",
    slot="reduce",
    paper="2508.00553",
    year=2025,
    code="Danielement321/HiPrune",
    requires=("images",),
)


class HiPrune(Reducer):
    """Keep anchors of a middle layer, their neighbours, and registers of a deep layer.

    Parameters
    ----------
    keep : Budget
        How much stays; shared out evenly over views.
    alpha : float
        Share of the budget for anchors and their neighbours; 0 leaves the deep layer alone, 1 the object layer.
    object_layer : int
        The middle layer, counted from 0; -1 for the one at 3/8 of all (9 of 24).
    deep_layer : int
        The deep layer; -1 for the one that ran last.
    min_anchors : int
        Anchors that budgets of 5 tokens and more get at least (a view).
    wrap : bool
        Neighbours as the released code takes them; otherwise none lies beyond an edge.
    positions : {"compact", "original"}
        Whether kept tokens are counted anew by the language model.
    """

    needs = frozenset({"queries", "keys"})

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.1,
        object_layer: Annotated[int, Field(ge=-1)] = -1,
        deep_layer: Annotated[int, Field(ge=-1)] = -1,
        min_anchors: Annotated[int, Field(ge=0)] = 0,
        wrap: bool = False,
        positions: Literal["compact", "original"] = "compact",
    ) -> None:
        super().__init__(keep)
        self.alpha, self.min_anchors, self.wrap = alpha, min_anchors, wrap
        self.object_layer, self.deep_layer, self.positions = object_layer, deep_layer, positions

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens; see `Reducer.attach`."""
        if Point.stage_of(at or self.at) == "decoder":
            raise OptionError("at", str(at), "encoder, or a place in it as vision:3: it reads attention of an encoder")
        return super().attach(model, at, **options)

    def layers(self, n_layers: int, layer: int) -> tuple[int, ...]:
        """Return the object layer and the deep layer."""
        middle = min(math.ceil(n_layers * 3 / 8) - 1, layer) if self.object_layer < 0 else self.object_layer
        deep = layer if self.deep_layer < 0 else self.deep_layer
        for name, value in (("object_layer", middle), ("deep_layer", deep)):
            if value > layer:
                raise OptionError(name, value, f"a layer up to {layer}, the last one that runs before the choice")
        return middle, deep

    def count(self, num_tokens: int, context: Context) -> int:
        """Return how many tokens stay: as many of every view."""
        kept = super().count(num_tokens, context)
        if kept < context.views:
            raise OptionError("keep", str(self.keep), f"a token for each of the {context.views} views")
        return kept if kept == num_tokens else kept - kept % context.views

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose by the attention that tokens get in two layers."""
        middle, deep = self.layers(context.n_layers, context.layer)
        place, allowed = context.places(x), context.allowed(x)
        scores, beside = received(x, middle, context), neighbours(place, context.grid, self.wrap)
        registers = scores if deep == middle else received(x, deep, context)
        kept = torch.zeros_like(allowed)
        share = keep // context.views
        for view in range(context.views):
            here = allowed & (place[..., 0] == view) if context.views > 1 else allowed
            kept |= hierarchical(scores, registers, beside, share, self._anchors(share), here)
        return mask_to_select(kept)

    def _anchors(self, budget: int) -> int:
        least = self.min_anchors if budget >= 5 else 0
        return min(max(round(budget * self.alpha / 5), least), budget)
