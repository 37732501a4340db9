"""A map whose outputs are mixtures of many tokens, with the book of who gave what to whom."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from tokenary.core.token_map import Dense, Segment, TokenMap
from tokenary.core.token_map.base import PositionPolicy


@dataclass(frozen=True, eq=False, repr=False)
class Mix(Dense):
    """Outputs that share tokens: two matrices, what is read and who stands for whom.

    ``matrix`` (*batch, M, N) is what ``apply`` does. ``mass`` (*batch, M, N) says which part of every token each output
    stands for; where a column sums to 1, nothing of that token is lost. `sizes` are sums of mass, and the way back,
    ``pinv``, hands each token the outputs that stand for it, in their parts.

    Parameters
    ----------
    matrix : Tensor
        (*batch, M, N); see `Mix.averages` for the one that follows from mass and sizes.
    validate : bool
        Check the shape.
    mass : Tensor
        (*batch, M, N), 0 or more.
    anchors : Tensor
        (*batch, M) int64, the token whose place and position an output takes.
    """

    validate: InitVar[bool] = True
    mass: Tensor = None  # type: ignore[assignment]
    anchors: Tensor = None  # type: ignore[assignment]

    @classmethod
    def averages(cls, mass: Tensor, anchors: Tensor, sizes: Tensor | None = None) -> Mix:
        """Return the means of tokens, weighed by mass and by the sizes (*batch, N) they already have."""
        weighed = mass if sizes is None else mass * sizes[..., None, :]
        total = weighed.sum(-1, keepdim=True)
        matrix = torch.where(total == 0, 0, weighed / torch.where(total == 0, 1, total))
        return cls(matrix, mass=mass, anchors=anchors)

    @classmethod
    def groups(cls, assign: Tensor, anchors: Tensor) -> Mix:
        """Return the anchors (*batch, M) themselves, each standing for the tokens with its number in `assign`.

        ``assign`` (*batch, N) holds numbers of outputs, below 0 for a token that nobody stands for.
        """
        outputs = torch.arange(anchors.shape[-1], device=assign.device)
        mass = (assign[..., None, :] == outputs[:, None]).float()
        matrix = torch.zeros_like(mass).scatter_(-1, anchors[..., None], 1.0)
        return cls(matrix, mass=mass, anchors=anchors)

    def sizes(self, prior: Tensor | None = None) -> Tensor:
        """Tokens that each output stands for, given the sizes that they have: (*lead, M)."""
        if prior is None:
            return self.mass.sum(-1)
        return (self.mass.to(prior.dtype) @ prior[..., None])[..., 0]

    def positions(self, p: Tensor, policy: PositionPolicy = "keep") -> Tensor:
        """Positions of the outputs; ``keep`` is that of the anchor, else as `TokenMap.positions`."""
        if policy != "keep":
            return super().positions(p, policy)
        lead = self._lead(p.shape[:-1])
        return p.expand(*lead, -1).gather(-1, self.anchors.expand(*lead, -1))

    def pinv(self) -> TokenMap:
        """Give every token the outputs that stand for it, in their parts."""
        total = self.mass.sum(-2, keepdim=True)
        return Dense((self.mass / torch.where(total == 0, 1, total)).mT)

    def _describe(self) -> str:
        return f"mixture of {self.shape[-1]} tokens in {self.shape[-2]}"


def anchors_of(map: TokenMap) -> Tensor:
    """Return the token whose place each output takes, (*batch, M) int64: its anchor, or the first of its sources."""
    policy: PositionPolicy = "keep" if map.single_source or isinstance(map, Mix) else "first"
    return map.positions(torch.arange(map.shape[-1], device=map.device), policy)


def segments(assign: Tensor, count: int, sizes: Tensor | None = None) -> Segment:
    """Return the means of the parts of ``assign`` (B, N), weighed by sizes, in the order of each part's first token.

    A number below 0 is of no part. The parts of a row are renumbered; empty ones come last.
    """
    parts = Segment(assign, count, weights=sizes, validate=False)
    n = assign.shape[-1]
    there = parts.mask(torch.ones(n, dtype=torch.bool, device=assign.device))
    first = parts.positions(torch.arange(n, device=assign.device), "first").masked_fill(~there, n)
    rank = first.argsort(dim=-1, stable=True).argsort(-1)
    renumbered = rank.gather(-1, assign.clamp_min(0)).masked_fill(assign < 0, -1)
    return Segment(renumbered, count, weights=sizes, validate=False)
