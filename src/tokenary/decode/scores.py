"""What a pass says about the nodes of a tree: argmax and top-k, computed when asked for, once."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_GROUP = 64


def top_k(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries, in descending order.

    A full ``topk`` over a vocabulary walks it slowly. The k largest entries lie in the k groups with the largest
    maxima, and group maxima are one fast pass.

    Parameters
    ----------
    logits : Tensor
        (..., V).
    k : int
        At most V.

    Returns
    -------
    Tensor
        Long, (..., k).
    """
    vocabulary = logits.shape[-1]
    groups = vocabulary // _GROUP
    if groups <= 2 * k:
        return logits.topk(k).indices
    body = logits[..., : groups * _GROUP].unflatten(-1, (groups, _GROUP))
    best = body.amax(-1).topk(k).indices  # (..., k)
    candidates = (best[..., None] * _GROUP + torch.arange(_GROUP, device=logits.device)).flatten(-2)
    tail = torch.arange(groups * _GROUP, vocabulary, device=logits.device)
    candidates = torch.cat([candidates, tail.expand(*candidates.shape[:-1], -1)], dim=-1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(k).indices)


class Scores:
    """The logits of one pass over a batch of trees.

    Parameters
    ----------
    logits : Tensor
        (B, W, V).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @functools.cached_property
    def argmax(self) -> np.ndarray:
        """Likeliest next token of each node, (B, W)."""
        return self.logits.max(-1).indices.cpu().numpy()  # five times as fast as argmax, and the first of equals too

    def top_k(self, k: int) -> np.ndarray:
        """The k likeliest next tokens of each node, (B, W, k), likeliest first."""
        return top_k(self.logits, k).cpu().numpy()
