"""What X-Token compares of a student: its probabilities carried over, and what is left of a vocabulary, by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenary.core.token_map import TokenMap

_EPS = 1e-10


def projected(probs: Tensor, map: TokenMap) -> Tensor:
    """Carry probabilities (C, V_S), averaged over each chunk, to K teacher tokens: log-probabilities (C, K).

    Averaged first, normalised within the K afterwards: the shares of a chunk's positions in the K tokens count.
    """
    carried = map.apply(probs, dim=-1)
    return (carried / (carried.sum(-1, keepdim=True) + _EPS) + _EPS).log()


def rest_columns(matched: Tensor, size: int) -> Tensor:
    """Return the tokens of a vocabulary that are not matched, ascending."""
    left = torch.ones(size, dtype=torch.bool, device=matched.device)
    left[matched] = False
    return torch.nonzero(left)[:, 0]


def ranked(log_probs: Tensor, count: int) -> Tensor:
    """Return the greatest `count` probabilities of each row (C, R), falling."""
    return log_probs.topk(count, dim=-1).values.exp()
