"""EntropyPrune (2026, arXiv 2602.17196).

A token's heads are a small matrix, H heads of d entries. Heads that say different things have a flat spectrum and a
high entropy; where they repeat each other it is low, and the token is cheap to lose. No attention map is looked at.

    R_j     = heads of token j, rotated queries of layer K - 1, less their mean over heads        H x d
    score_j = -sum l log l / log H,    l the eigenvalues of R_j R_j^T / H, at least 1e-10         H x H, float64

The M largest stay. P is M x N with one 1 a row, tokens in their order, on text the identity; every token stands for
itself (sizes 1). Kept tokens have the positions that they had among all, and what is decoded goes on behind the full
length. Layers below K hold N image tokens, the others M.

The budget B is an average over the L layers: M = floor((L B - K N) / (L - K)). K is the layer behind the one where the
entropy of all image tokens of a layer collapses; `EntropyCurve` finds it. The paper names that layer, our formula of
the curve is not its own, as the released code takes K as given (LLaVA-1.5-7B: 2 of 32).

Eigenvalues are those that the released code takes, which does not divide them by their sum: its score is no entropy
where norms differ. l log l turns at l = 1/e, so that beyond it large queries are dropped first. ``normalise="trace"``
is the text-book entropy (of 2 heads always 0), ``score="norm"`` and ``"spread"`` are the controls without any spectrum.
Keys that several queries share need not be repeated: the eigenvalues above 0, hence the order, are the same.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.token_map import Select
from tokenary.reduce.base import Context, Need, Point, Reducer
from tokenary.reduce.choose import top
from tokenary.reduce.entropy_prune.entropy import EntropyCurve, collapse, head_entropy, head_gram, layer_entropy

__all__ = ["EntropyCurve", "EntropyPrune", "collapse", "head_entropy", "head_gram", "layer_entropy"]

CARD = Card(
    slug="entropy-prune",
    cls="EntropyPrune",
    room="reduce",
    title="EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal Large Language Models",
    summary="drops the image tokens whose heads say the same thing, behind the layer where entropy collapses",
    slot="reduce",
    paper="2602.17196",
    year=2026,
    code="YahongWang1/EntropyPrune",
    requires=("images",),
)


class EntropyPrune(Reducer):
    """Keep the tokens whose heads differ most.

    Parameters
    ----------
    keep : Budget
        How much stays.
    budget : {"average", "kept"}
        Whether that is an average over all layers, those that see everything included, or what later layers see.
    matrix : {"queries", "keys", "values", "hidden"}
        What the heads are read from: projections of the layer below (queries and keys rotated), or what that layer
        returns, each token divided by its root mean square and cut into as many parts as there are heads of queries.
    normalise : {"none", "trace"}
        Whether eigenvalues are divided by their sum; ``none`` is what was released.
    score : {"entropy", "norm", "spread"}
        Entropy; or the controls: the norm of the token's matrix, and that of the matrix less its mean over heads, which
        is all that ``trace`` takes out.
    reverse : bool
        Keep the smallest scores instead.
    """

    at = "decoder:25%"
    positions = "original"
    permutes = True

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.5),  # noqa: B008 (frozen)
        budget: Literal["average", "kept"] = "average",
        matrix: Literal["queries", "keys", "values", "hidden"] = "queries",
        normalise: Literal["none", "trace"] = "none",
        score: Literal["entropy", "norm", "spread"] = "entropy",
        reverse: bool = False,
    ) -> None:
        super().__init__(keep)
        self.budget, self.matrix, self.normalise = budget, matrix, normalise
        self.score, self.reverse = score, reverse
        recorded: Need = "queries" if matrix == "hidden" else matrix
        self.needs = frozenset({recorded})  # type: ignore[misc]

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens; see `Reducer.attach`."""
        if self.budget == "average" and Point.stage_of(at or self.at) != "decoder":
            raise OptionError("at", str(at or self.at), "decoder:LAYER, over whose layers the budget is an average")
        return super().attach(model, at, **options)

    def count(self, num_tokens: int, context: Context) -> int:
        """Return how many tokens later layers see."""
        kept = super().count(num_tokens, context)
        if self.budget == "kept" or kept == num_tokens:
            return kept
        full, layers = context.layer + 1, context.n_layers
        left = layers * kept - full * num_tokens
        if full >= layers:
            raise OptionError("budget", self.budget, "kept, where no layer is left to see fewer tokens")
        if left < layers - full:
            least = math.ceil((full * num_tokens + layers - full) / layers)
            raise OptionError(
                "keep", str(self.keep), f"at least {least} of {num_tokens} tokens, as {full} of {layers} layers see all"
            )
        return left // (layers - full)

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose by the heads of each token."""
        scores = self.scores(self._heads(x, context))
        return top(-scores if self.reverse else scores, keep, context.allowed(x))

    def scores(self, heads: Tensor) -> Tensor:
        """Return the score (B, N) float64 of tokens (B, N, H, d)."""
        if self.score == "norm":
            return heads.double().flatten(-2).norm(dim=-1)
        if self.score == "spread":
            return head_gram(heads).diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        return head_entropy(heads, self.normalise)

    def _heads(self, x: Tensor, context: Context) -> Tensor:
        """Return the matrix of each token, (B, N, H, d)."""
        states: Tensor = getattr(context, "queries" if self.matrix == "hidden" else self.matrix)[context.layer]
        least = 3 if self.score == "entropy" and self.normalise == "trace" else 2  # two heads, less their mean, are one
        if states.shape[1] < least:
            raise OptionError("matrix", self.matrix, f"a matrix of {least} heads or more, not {states.shape[1]}")
        if self.matrix == "hidden":
            scale = x.float().square().mean(-1, keepdim=True).clamp_min(1e-6).rsqrt()
            return (x.float() * scale).unflatten(-1, (states.shape[1], -1))
        return context.by_picture(context.image(states.transpose(1, 2), 1))
