"""IDPruner (2026, arXiv 2602.13315), with the scorer of VisionSelector (2025, arXiv 2510.16598).

To prune is to re-rank: tokens are picked one by one by Maximal Marginal Relevance, important and no copy of what is
already picked.

    Imp_i = (w_i - min w) / (max w - min w + 1e-6)          importance, scaled so that it can be weighed against cosines
    first   argmax Imp
    then    argmax over the others of  lambda Imp_i - (1 - lambda) max over picked j of cos(v_i, v_j)

    P is M x N with one 1 a row, tokens in their order; sizes 1. Kept tokens keep their numbers, or are counted anew:
    ``positions``. All layers behind hold M tokens.

lambda 1 is the top of importance, lambda 0 is max-min diversity. w comes from a trained scorer (`Scorer`, by
`train_scorer`: one linear direction that depends on the picture, no attention); where there is none, from a fallback,
which the paper's own analysis shows to be another method: most of its gain on text in pictures is the scorer.

The budget is this room's: a share is rounded down, where the paper rounds to the nearest number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Need, Reducer
from tokenary.reduce.choose import chosen_in_order
from tokenary.reduce.idpruner.learning import learn_scorer
from tokenary.reduce.idpruner.scorer import Scorer, SoftTopK, load_scorer, save_scorer
from tokenary.reduce.idpruner.training import train_scorer

__all__ = [
    "IDPruner", "Scorer", "SoftTopK", "learn_scorer", "load_scorer", "marginal_relevance", "save_scorer", "scaled",
    "trade_off", "train_scorer",
]  # fmt: skip

CARD = Card(
    slug="idpruner",
    cls="IDPruner",
    room="reduce",
    title="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
    summary="picks image tokens one by one, important ones that are no copies of those it has",
    slot="reduce",
    paper="2602.13315",
    year=2026,
    code="Tencent/AngelSlim",
    training="minutes",
    requires=("images",),
)


class IDPruner(Reducer):
    """Pick tokens by Maximal Marginal Relevance.

    Parameters
    ----------
    keep : Budget
        How much stays.
    weight : float
        Of importance, the paper's lambda; the rest is that of diversity.
    scorer : str
        File of a scorer trained for the model; see `train_scorer` and `save_scorer`.
    fallback : {"attention", "norm", "text"}
        Importance where there is no scorer: what the class token attends to (where there is none, all tokens); the
        norm; the likeness to the mean of the question's embeddings.
    parallel : int
        Tokens picked a round behind the first: faster, but copies within a round go unpunished.
    positions : {"compact", "original"}
        Whether kept tokens are counted anew by the language model.
    """

    permutes = True
    learns = "scorer"

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
        scorer: str = "",
        fallback: Literal["attention", "norm", "text"] = "attention",
        parallel: Annotated[int, Field(ge=1)] = 1,
        positions: Literal["compact", "original"] = "original",
    ) -> None:
        super().__init__(keep)
        self.weight, self.fallback, self.parallel, self.positions = weight, fallback, parallel, positions
        self.scorer = load_scorer(scorer) if scorer else None
        needed: dict[str, tuple[Need, ...]] = {"attention": ("queries", "keys"), "norm": (), "text": ("text",)}
        self.needs = frozenset(needed[fallback] if self.scorer is None else ())  # type: ignore[misc]

    @classmethod
    def learn(cls, model: Any, file: Path, **options: Any) -> None:
        """Train a scorer for a `BenchVLM`; see `learn_scorer`."""
        save_scorer(learn_scorer(model, **options)[0], file)

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Pick by importance and likeness."""
        allowed = context.allowed(x)
        return marginal_relevance(self.raw(x, context), x, keep, self.weight, allowed, self.parallel)

    def raw(self, x: Tensor, context: Context) -> Tensor:
        """Return how important each token is, on any scale: (B, N) float32."""
        if self.scorer is not None:
            return self.scorer(x.float(), context.allowed(x))
        if self.fallback == "norm":
            return x.float().norm(dim=-1)
        if self.fallback == "text":
            return self._likeness_to_text(x, context)
        front = context.span is not None and context.span[0] > 0
        attention = context.attention(rows=slice(0, 1) if front else slice(None))
        return context.by_picture(context.image(attention.mean((1, 2)), 1))

    @staticmethod
    def _likeness_to_text(x: Tensor, context: Context) -> Tensor:
        if context.text is None:  # a picture without a question
            return torch.zeros(x.shape[:2], device=x.device)
        text = context.text.float()
        there = torch.ones(text.shape[:2], device=x.device) if context.text_mask is None else context.text_mask.float()
        mean = (text * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)
        return F.cosine_similarity(x.float(), mean[:, None], dim=-1)


def scaled(raw: Tensor, allowed: Tensor) -> Tensor:
    """Scale scores (B, N) to [0, 1] among the tokens that are allowed."""
    raw = raw.float()
    low = raw.masked_fill(~allowed, float("inf")).amin(-1, keepdim=True)
    high = raw.masked_fill(~allowed, float("-inf")).amax(-1, keepdim=True)
    return ((raw - low) / (high - low + 1e-6)).masked_fill(~allowed, 0.0)


def marginal_relevance(
    raw: Tensor, features: Tensor, keep: int, weight: float, allowed: Tensor | None = None, parallel: int = 1
) -> Select:
    """Pick tokens that are important and unlike those picked before; of equal ones the first.

    Parameters
    ----------
    raw : Tensor
        (B, N) importance on any scale.
    features : Tensor
        (B, N, D) tokens as the language model reads them.
    keep : int
        M.
    weight : float
        Of importance, 0 to 1.
    allowed : Tensor, optional
        (B, N) bool.
    parallel : int
        Tokens a round.

    Returns
    -------
    Select
        (B, M, N).
    """
    allowed = torch.ones_like(raw, dtype=torch.bool) if allowed is None else allowed
    importance, unit = scaled(raw, allowed), _unit(features)
    free, nearest = allowed.clone(), torch.full_like(importance, -2.0)  # below every cosine
    picks: list[Tensor] = []
    there: list[Tensor] = []
    while (count := sum(each.shape[1] for each in picks)) < keep:
        scores = importance if count == 0 else weight * importance - (1 - weight) * nearest
        scores = scores.masked_fill(~free, float("-inf"))
        step = 1 if count == 0 else min(parallel, keep - count)
        if step == 1:
            pick = scores.argmax(-1, keepdim=True)
        else:
            pick = scores.argsort(dim=-1, descending=True, stable=True)[:, :step]
        picks.append(pick)
        there.append(free.gather(1, pick))
        free = free.scatter(1, pick, False)
        like = unit @ unit.gather(1, pick[..., None].expand(-1, -1, unit.shape[-1])).mT  # (B, N, step)
        nearest = torch.maximum(nearest, like.amax(-1))
    return chosen_in_order(torch.cat(picks, 1), torch.cat(there, 1), raw.shape[1])


def trade_off(chosen: Select, raw: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two goods that a choice weighs: the share of importance it holds, and how well it covers all tokens.

    Parameters
    ----------
    chosen : Select
        (B, M, N) without empty rows.
    raw : Tensor
        (B, N) importance on any scale.
    features : Tensor
        (B, N, D).

    Returns
    -------
    (B,) Tensor, (B,) Tensor
        The importance of chosen tokens over that of all; the mean over all tokens of the cosine of the nearest one.
    """
    importance, unit = scaled(raw, torch.ones_like(raw, dtype=torch.bool)), _unit(features)
    held = chosen.apply(importance, dim=-1).sum(-1) / importance.sum(-1).clamp_min(1e-12)
    return held, (unit @ chosen.apply(unit).mT).amax(-1).mean(-1)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.norm(dim=-1, keepdim=True) + 1e-8)
