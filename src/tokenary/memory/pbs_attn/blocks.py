"""Sorting keys inside segments and choosing blocks of them: tensors in, a map or a mask out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.core.token_map import Permute

Pool = Literal["mean", "max"]


def importance(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention that keys receive, without a causal mask.

    Parameters
    ----------
    query, key : Tensor
        (H, n, D) and (Hkv, N, D).
    scale : float
        Factor on the logits.

    Returns
    -------
    Tensor
        (H, N) float32.
    """
    groups = query.shape[0] // key.shape[0]
    rows = (query[head].float() @ key[head // groups].float().T * scale for head in range(len(query)))
    return torch.stack([logits.softmax(-1).mean(0) for logits in rows])


def sorted_inside(scores: Tensor, segment: int, n_keys: int) -> Permute:
    """Sort inside segments by falling score, the earlier of equals first; a remainder keeps its order.

    Parameters
    ----------
    scores : Tensor
        (H, M), M a multiple of `segment`.
    segment, n_keys : int
        Keys a segment, and in all.

    Returns
    -------
    Permute
        (H, n_keys, n_keys).
    """
    heads, complete = scores.shape
    inside = scores.view(heads, -1, segment).argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, complete, segment, device=scores.device)
    rest = torch.arange(complete, n_keys, device=scores.device).expand(heads, -1)
    return Permute(torch.cat([(inside + starts[:, None]).view(heads, -1), rest], dim=1), validate=False)


def pooled(states: Tensor, block: int, how: Pool) -> Tensor:
    """Mean or maximum over blocks of tokens: (..., N, D) to (..., ceil(N / block), D) float32."""
    whole = states.shape[-2] // block * block
    parts = [states[..., :whole, :].unflatten(-2, (-1, block)), states[..., whole:, :].unsqueeze(-3)]
    parts = [part.float() for part in parts if part.shape[-2]]
    return torch.cat([part.mean(-2) if how == "mean" else part.amax(-2) for part in parts], dim=-2)


def choose_blocks(
    scores: Tensor, order: Permute, n_queries: int, block: int, segment: int, mass: float, sink: bool
) -> Tensor:
    """Choose what each block of queries reads.

    Parameters
    ----------
    scores : Tensor
        (H, nq, nk), of a block of queries for a block of permuted keys.
    order : Permute
        (H, N, N), how the keys are sorted inside segments.
    n_queries : int
        Q; the queries are the newest of the keys.
    block, segment, mass, sink
        As in `PBSAttn`.

    Returns
    -------
    Tensor
        (H, nq, nk) bool.
    """
    n_keys, device = order.shape[-1], scores.device
    first = n_keys - n_queries + torch.arange(0, n_queries, block, device=device)[:, None]
    last = (first + block - 1).clamp(max=n_keys - 1)
    of_block = torch.arange(0, n_keys, block, device=device) // segment
    earlier, own = of_block < first // segment, of_block >= first // segment  # (nq, nk)
    chosen = earlier & top_mass(scores.masked_fill(~earlier, float("-inf")), mass)
    index = pad(order.index, (0, -n_keys % block), value=n_keys).view(len(scores), -1, block)
    if sink:
        chosen |= (index == 0).any(-1)[:, None]
    return (chosen | own) & (index.amin(-1)[:, None] <= last)


def top_mass(scores: Tensor, mass: float) -> Tensor:
    """Mark the largest entries of a softmax up to, and with, the one at which their sum reaches `mass`.

    Parameters
    ----------
    scores : Tensor
        (..., n) logits; a row of nothing but -inf has no largest ones.
    mass : float
        In (0, 1]; 1 marks all.

    Returns
    -------
    Tensor
        (..., n) bool.
    """
    if mass >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    weights, places = scores.softmax(-1).nan_to_num(0).sort(dim=-1, descending=True, stable=True)
    before = pad(weights.cumsum(-1), (1, 0))[..., :-1]
    marked = (before < mass) & (weights > 0)
    return torch.zeros_like(marked).scatter(-1, places, marked)


def causal_pairs(n_queries: int, n_keys: int, block: int) -> int:
    """Count the pairs of blocks that causal attention computes, a head."""
    first = n_keys - n_queries
    return sum((min(first + at + block, n_keys) - 1) // block + 1 for at in range(0, n_queries, block))
