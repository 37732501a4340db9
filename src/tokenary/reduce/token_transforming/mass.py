"""Who stands for whom: the mass matrix of the method, and those of others, (*batch, M, N)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def share_out(
    likeness: Tensor,
    anchors: Tensor,
    there: Tensor,
    takes: Tensor,
    *,
    tau: float = 0.1,
    spread: int = 4,
    rho: float = 1.0,
    gates: Tensor | None = None,
) -> Tensor:
    """Return the mass A: what of every token each output stands for.

    Parameters
    ----------
    likeness : Tensor
        (B, M, N), between -1 and 1, of anchors and tokens.
    anchors, there : Tensor
        (B, M) their numbers, and which of them are real.
    takes : Tensor
        (B, M, N) bool, into which anchor each token may flow; a token without any loses its mass.
    tau, spread, rho
        As of `TokenTransforming`.
    gates : Tensor, optional
        (B, N) in [0, 1], what of its mass each token keeps; anchors keep theirs.

    Returns
    -------
    Tensor
        (B, M, N) float32; columns sum to 1, or to the gate.
    """
    logits = likeness.masked_fill(~takes, float("-inf"))
    if tau == 0:
        mass = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    else:
        mass = (logits / tau).softmax(1)
    mass = mass.masked_fill(~takes, 0.0)  # also columns that nobody takes
    if 0 < spread < mass.shape[1]:
        largest = mass.topk(spread, dim=1)
        parts = largest.values / largest.values.sum(1, keepdim=True).clamp_min(1e-30)
        mass = torch.zeros_like(mass).scatter_(1, largest.indices, parts)
    own = torch.eye(anchors.shape[1], device=anchors.device)  # (M, M)
    column = anchors[:, None].expand(-1, anchors.shape[1], -1)  # (B, M, M): the columns of anchors
    kept = rho * own + (1 - rho) * mass.gather(2, column)
    if gates is not None:
        mass = mass * gates[:, None]
    # Outputs without an anchor name token 0; what they would write there is left out.
    column = torch.where(there[:, None].expand_as(column), column, mass.shape[2])
    return F.pad(mass, (0, 1)).scatter_(2, column, kept)[..., :-1]


def pruning(anchors: Tensor, num_tokens: int) -> Tensor:
    """Mass of pruning: outputs (*batch, M) are tokens, the others are lost: (*batch, M, N)."""
    return F.one_hot(anchors, num_tokens).float()


def pooling(assign: Tensor, count: int) -> Tensor:
    """Mass of pooling or of merging: token j is of output ``assign`` (*batch, N): (*batch, M, N)."""
    return F.one_hot(assign, count).mT.float()


def perceiving(queries: Tensor, x: Tensor, tau: float = 1.0) -> Tensor:
    """Mass from learned queries (M, d) and tokens (*batch, N, d), each token spread over all: (*batch, M, N)."""
    return (queries @ x.mT / (tau * x.shape[-1] ** 0.5)).softmax(-2)
