"""Alignment: whether pictures and their captions have the same neighbours in a layer's states.

States of image tokens are pooled by size, sum_i s_i y_i / sum_i s_i: a mean over patches, not over tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled(states: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean of tokens (B, M, D) over the patches they stand for, sizes (B, M): (B, D)."""
    weight = sizes.to(states.dtype)
    return (weight[..., None] * states).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-12)


def _near(x: Tensor) -> Tensor:
    """Cosines of centred states (n, D): (n, n) float64."""
    unit = F.normalize(x.double() - x.double().mean(0), dim=-1)
    return unit @ unit.T


def mutual_neighbours(x: Tensor, y: Tensor, k: int = 10) -> Tensor:
    """Return for each of n pairs the share of its k nearest neighbours that are the same in both spaces, (n,).

    Nearness is the cosine of centred states (n, D) and (n, E). By chance it is k / (n - 1).
    """
    k = min(k, len(x) - 1)
    found = []
    for states in (x, y):
        near = _near(states).fill_diagonal_(-torch.inf)
        found.append(torch.zeros_like(near).scatter(1, near.topk(k, dim=1).indices, 1.0))
    return (found[0] * found[1]).sum(1) / k


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of n pairs, (n, D) and (n, E): 0 to 1 (Kornblith et al. 2019)."""
    a, b = (each.double() - each.double().mean(0) for each in (x, y))
    joint = (a.T @ b).square().sum()
    alone = (a.T @ a).square().sum().sqrt() * (b.T @ b).square().sum().sqrt()
    return float(joint / alone) if float(alone) > 0 else float("nan")


def retrieved(x: Tensor, y: Tensor) -> Tensor:
    """Return for each of n pairs of centred states (n, D) whether its own partner is the nearest: (n,) float64.

    From x to y; of several equally near, the part of 1 that falls on the partner.
    """
    first, second = (F.normalize(each.double() - each.double().mean(0), dim=-1) for each in (x, y))
    near = first @ second.T
    best = near >= near.amax(1, keepdim=True) - 1e-12
    return best.diagonal().double() / best.sum(1)
