"""A linear layer with a trained update of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LowRank(nn.Module):
    """A frozen linear layer W and an update: ``x W' + scale (x A') B'``; B is zero at first.

    Parameters
    ----------
    base : nn.Linear
        Frozen.
    rank : int
        Of the update.
    generator : torch.Generator, optional
        Draws A (rank, in); by default PyTorch's own.
    scale : float
        Of the update.
    """

    def __init__(
        self, base: nn.Linear, rank: int, generator: torch.Generator | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.base(x) + self.scale * linear(linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the linear layer, the update added to it."""
        self.base.weight += self.scale * self.B @ self.A
        return self.base
