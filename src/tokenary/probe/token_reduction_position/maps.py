"""What a token map is like, whatever the model makes of it: coverage, locality, redundancy and conservation of mass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def coverage(mass: Tensor) -> Tensor:
    """Return how evenly patches are stood for: the entropy of column sums of ``mass`` (B, M, N) over log N, (B,).

    1 where every patch counts the same, log M / log N where M of them are kept and stand for themselves.
    """
    columns = mass.sum(1).double()
    share = columns / columns.sum(1, keepdim=True).clamp_min(1e-30)
    entropy = torch.special.entr(share).sum(1)
    return entropy / math.log(mass.shape[-1]) if mass.shape[-1] > 1 else torch.ones_like(entropy)


def locality(mass: Tensor, anchors: Tensor, places: Tensor) -> Tensor:
    """Return the mean distance of patches from the places of the tokens that stand for them, weighed by mass, (B,).

    Parameters
    ----------
    mass : (B, M, N) Tensor
        Which part of each patch a token stands for.
    anchors : (B, M) int64 Tensor
        The patch whose place each token has; below 0 for none.
    places : (N, 2) Tensor
        Row and column of each patch, in patches.
    """
    distance = torch.cdist(places.double(), places.double())[anchors.clamp_min(0)]  # (B, M, N)
    weighed = mass.double() * (anchors >= 0)[..., None]
    return (weighed * distance).sum((1, 2)) / weighed.sum((1, 2)).clamp_min(1e-30)


def redundancy(outputs: Tensor, there: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens (B, M, D) of each one's largest cosine to another, (B,); 0 for a single token.

    ``there`` (B, M) bool says which are tokens at all.
    """
    unit = F.normalize(outputs.double(), dim=-1)
    valid = torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device) if there is None else there
    itself = torch.eye(outputs.shape[1], dtype=torch.bool, device=outputs.device)
    pairs = valid[:, :, None] & valid[:, None] & ~itself
    if outputs.shape[1] == 0:
        return torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device)
    nearest = (unit @ unit.mT).masked_fill(~pairs, -torch.inf).amax(2)
    nearest = torch.where(torch.isfinite(nearest), nearest, 0)
    return (nearest * valid).sum(1) / valid.sum(1).clamp_min(1)


def conserved(sizes: Tensor, patches: int) -> Tensor:
    """Return how many patches the sizes (B, M) add up to, as a share of all of them: (B,); 1 where none is lost."""
    return sizes.double().sum(1) / patches
