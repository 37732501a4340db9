"""Grounding: how much of an answer's attention falls on the patches of what was asked, through the token map.

A token that stands for several patches hands its attention to them in the parts that it stands for:

    a[n] = sum_m attention[m] mass[m, n] / size[m]        size[m] = sum_n mass[m, n]

so that merging neither makes nor hides grounding by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grounding:
    """Figures of B answers.

    Attributes
    ----------
    mass : (B,) Tensor
        Share of the answer token's attention, mean over layers and heads, on the patches of what was asked.
    image : (B,) Tensor
        The same on all of the image.
    pointing : (B,) Tensor
        1 where the patch with the most attention belongs to what was asked; where patches of one token share the
        most, the part of them that does.
    evidence : (B,) Tensor
        Part of these patches that some token stands for.
    """

    mass: Tensor
    image: Tensor
    pointing: Tensor
    evidence: Tensor


def patch_attention(attention: Tensor, mass: Tensor) -> Tensor:
    """Hand the attention on tokens (B, M) to patches, given which part of each a token stands for, (B, M, N): (B, N).

    Attention on a token that stands for no patch (a newline) is left out.
    """
    size = mass.sum(-1)
    per_patch = torch.where(size > 0, attention / torch.where(size > 0, size, 1), 0)
    return (per_patch[:, None] @ mass)[:, 0]


def grounding(attention: Sequence[Tensor], mass: Sequence[Tensor], asked: Tensor) -> Grounding:
    """Measure the attention of answer tokens.

    Parameters
    ----------
    attention : sequence of (B, M) Tensor
        For each layer the attention on image tokens, mean over heads; what is not on the image is not in it.
    mass : sequence of (B, M, N) Tensor
        For each layer the patches that each of its image tokens stands for.
    asked : (B, N) bool Tensor
        Patches of what was asked.
    """
    patches = torch.stack([patch_attention(a, m) for a, m in zip(attention, mass, strict=True)]).mean(0)
    wanted = asked.to(patches.dtype)
    most = patches.amax(1, keepdim=True)
    best = ((patches >= most * (1 - 1e-5)) & (most > 0)).to(patches.dtype)
    return Grounding(
        (patches * wanted).sum(1),
        patches.sum(1),
        (best * wanted).sum(1) / best.sum(1).clamp_min(1),
        evidence(mass[-1], asked),
    )


def evidence(mass: Tensor, asked: Tensor) -> Tensor:
    """Return the part of the asked patches (B, N) bool that tokens stand for, given ``mass`` (B, M, N): (B,)."""
    wanted = asked.to(mass.dtype)
    return (mass.sum(1).clamp_max(1) * wanted).sum(1) / wanted.sum(1).clamp_min(1)
