"""Token Transforming (Zeng et al. 2025, arXiv 2506.05709).

Any reducer is a matrix, Y = P X. Pruning has rows of one 1, merging columns of one entry: a token serves one output.
Here a token is spread over several, by its likeness to the tokens that stay, the anchors:

    A[i, j] = softmax over anchors i of cos(x_i, x_j) / tau        what of token j output i stands for; columns sum to 1
    P       = diag(A s)^-1 A diag(s)                               means of tokens of sizes s; rows sum to 1
    Y = P X,    s' = A s,    X^ = A^T Y                            tokens, their sizes, and the way back

The map is the `Mix` of A and P: ``apply`` is P, ``sizes`` is A s, ``pinv`` is A^T, and ``apply`` on rows and columns of
patches gives the centroids of what each output was made of. Two maps after each other are that of A2 A1.

Anchors are the tokens that the class token attends to most. An anchor gives ``rho`` of itself to its own output, and
only the ``spread`` largest entries of a column count. Later blocks weigh keys by sizes (proportional attention).

The paper's tables and its formula of the matrix were not at hand: likeness, temperature, spread and anchors are our
parameterisation of its abstract, after what token merging does. `tau` and `metric` are those that lost least among a
few on training pictures of CIFAR-10.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Kind, Reducer
from tokenary.reduce.choose import chosen_in_order, top
from tokenary.reduce.grid import partition
from tokenary.reduce.mix import Mix
from tokenary.reduce.token_transforming.mass import perceiving, pooling, pruning, share_out

__all__ = ["TokenTransforming", "perceiving", "pooling", "pruning", "share_out"]

CARD = Card(
    slug="token-transforming",
    cls="TokenTransforming",
    room="reduce",
    title="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer "
    "Acceleration",
    summary="lets every image token flow into the few most alike of those that stay, in parts",
    slot="reduce",
    paper="2506.05709",
    year=2025,
    code="AuroraZengfh/TokenTransforming",
    requires=("images",),
)


class TokenTransforming(Reducer):
    """Spread every token over the anchors that are most like it.

    Parameters
    ----------
    keep : Budget
        How much stays behind the last of its places.
    tau : float
        Temperature of the likeness; 0 gives each token to the nearest anchor (hard merging).
    spread : int
        Anchors that a token may flow into; 0 for all.
    rho : float
        What an anchor gives to its own output; the rest flows as that of any token.
    anchors : {"top", "strided"}
        The most important tokens, or the most important one of each cell of a coarse grid.
    importance : {"class", "received", "distinct"}
        What the class token attends to (where there is none, as ``received``); what all tokens attend to; how unlike
        the others a token is, which needs no attention.
    metric : {"tokens", "keys"}
        What likeness is taken of: the tokens themselves, or keys averaged over heads.
    gate : float
        What the least important token keeps of its mass; others in proportion between it and 1. Below 1, sizes add up
        to less than the number of tokens.
    causal : bool
        In a language model: tokens flow only into anchors behind them, and attention is read as the model masks it.
        The last token is an anchor then, so that each has one to flow into.
    proportional : bool
        Whether later layers weigh tokens by their sizes.
    """

    kind: Kind = "merge"
    at = "vision:25%,50%,75%"

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        tau: Annotated[float, Field(ge=0)] = 0.03,
        spread: Annotated[int, Field(ge=0)] = 4,
        rho: Annotated[float, Field(gt=0, le=1)] = 1.0,
        anchors: Literal["top", "strided"] = "top",
        importance: Literal["class", "received", "distinct"] = "class",
        metric: Literal["tokens", "keys"] = "tokens",
        gate: Annotated[float, Field(ge=0, le=1)] = 1.0,
        causal: bool = False,
        proportional: bool = True,
    ) -> None:
        super().__init__(keep)
        self.tau, self.spread, self.rho, self.gate = tau, spread, rho, gate
        self.anchors, self.importance, self.metric, self.causal = anchors, importance, metric, causal
        self.proportional = proportional
        attends = importance != "distinct"
        self.needs = frozenset(("queries", "keys") if attends else ("keys",) if metric == "keys" else ())  # type: ignore[misc]
        self.permutes = anchors == "top" and not causal  # type: ignore[misc]

    def plan(self, x: Tensor, keep: int, context: Context) -> Mix:
        """Choose anchors, and share every token out among them."""
        allowed = context.allowed(x)
        unit = F.normalize((x if self.metric == "tokens" else self._keys(context)).float(), dim=-1)  # (B, N, d)
        scores = self._scores(unit, allowed, context)
        chosen = self._anchors(x, scores, keep, context)
        at = chosen.index.expand(len(x), -1)  # (B, M)
        there = torch.ones_like(at, dtype=torch.bool) if chosen.valid is None else chosen.valid
        likeness = unit.gather(1, at[..., None].expand(-1, -1, unit.shape[-1])) @ unit.mT  # (B, M, N)
        most = scores.masked_fill(~allowed, 0).amax(-1, keepdim=True).clamp_min(1e-12)
        gates = None if self.gate == 1 else self.gate + (1 - self.gate) * scores / most
        takes = there[..., None] & allowed[:, None]
        if self.causal:
            takes = takes & (torch.arange(x.shape[1], device=x.device) <= at[..., None])
        mass = share_out(likeness, at, there, takes, tau=self.tau, spread=self.spread, rho=self.rho, gates=gates)
        return Mix.averages(mass, at, context.sizes)

    @staticmethod
    def _keys(context: Context) -> Tensor:
        return context.by_picture(context.image(context.keys[context.layer].mean(1), 1))

    def _scores(self, unit: Tensor, allowed: Tensor, context: Context) -> Tensor:
        """How important each token is, (B, N), 0 or more."""
        if self.importance == "distinct":
            others = (unit * allowed[..., None]).sum(1, keepdim=True) - unit
            count = (allowed.sum(-1, keepdim=True) - 1).clamp_min(1)
            return 1 - (unit * others).sum(-1) / count  # in [0, 2]
        if self.importance == "class" and context.span is not None and context.span[0] > 0:
            attention = context.attention(rows=slice(0, 1))
        elif self.causal:
            logits = context.attention_logits()
            unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            attention = logits.masked_fill(unseen, float("-inf")).softmax(-1)
        else:
            attention = context.attention()
        return context.by_picture(context.image(attention.mean((1, 2)), 1))

    def _anchors(self, x: Tensor, scores: Tensor, keep: int, context: Context) -> Select:
        allowed = context.allowed(x)
        if self.causal:
            last = (allowed.cumsum(-1) == allowed.sum(-1, keepdim=True)) & allowed
            scores = scores.masked_fill(last, float("inf"))
        if self.anchors == "top":
            return top(scores, keep, allowed)
        cell = partition(x, keep, context)[:, None] == torch.arange(keep, device=x.device)[:, None]  # (B, M, N)
        best = scores[:, None].masked_fill(~cell, float("-inf")).max(-1)
        return chosen_in_order(best.indices, cell.any(-1), x.shape[1])
