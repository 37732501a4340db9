"""The two branches of hybrid attention: a softmax over exact tokens, and sums over the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenary.memory.still.maps import Maps


@dataclass(frozen=True, eq=False)
class State:
    """The sums of the linear branch.

    Parameters
    ----------
    products : Tensor
        S, (..., Hq, 2 D, D).
    weights : Tensor
        Z, (..., Hq, 2 D).
    """

    products: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, maps: Maps, like: Tensor) -> State:
        """Return sums of nothing, in the dtype and on the device of `like`."""
        shape = (maps.heads, 2 * maps.size)
        return cls(like.new_zeros(*shape, maps.size), like.new_zeros(shape))

    @classmethod
    def stack(cls, states: Sequence[State]) -> State:
        """Put the sums of several sequences beside each other: (B, Hq, ...)."""
        return cls(torch.stack([s.products for s in states]), torch.stack([s.weights for s in states]))

    def add(self, maps: Maps, keys: Tensor, values: Tensor) -> State:
        """Return the sums with tokens added, keys and values (Hkv, N, D)."""
        keys, values = (x.repeat_interleave(maps.heads // len(x), dim=0).to(self.weights.dtype) for x in (keys, values))
        features = maps.key(keys)
        return State(self.products + features.mT @ values, self.weights + features.sum(-2))

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi_q(q) S, (..., Hq, W, D), and phi_q(q) . Z, (..., Hq, W, 1), of queries' features."""
        return features @ self.products, features @ self.weights[..., None]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.products.nbytes + self.weights.nbytes


@dataclass(frozen=True, eq=False)
class Exact:
    """What the exact branch says of some queries.

    Parameters
    ----------
    sums, mass : Tensor
        Of u_i v_i, (..., Hq, W, D), and of u_i, (..., Hq, W, 1).
    most : Tensor
        The largest logit, (..., Hq, W, 1).
    """

    sums: Tensor
    mass: Tensor
    most: Tensor

    @classmethod
    def of(cls, logits: Tensor, values: Tensor) -> Exact:
        """Attend with logits (..., Hkv, G, W, M), -inf where a query must not look, to values (..., Hkv, M, D)."""
        most = logits.amax(-1, keepdim=True)
        weights = (logits - most).exp_()
        sums = (weights.flatten(-3, -2) @ values).unflatten(-2, weights.shape[-3:-1])
        return cls(*(x.flatten(-4, -3) for x in (sums, weights.sum(-1, keepdim=True), most)))

    def joined(self, linear: tuple[Tensor, Tensor], gates: Tensor, rescale: bool) -> Tensor:
        """Join with the linear branch: (..., Hq, W, D).

        Parameters
        ----------
        linear : tuple of Tensor
            phi_q(q) S and phi_q(q) . Z, as from `State.read`.
        gates : Tensor
            How much of the former is added, (..., Hq, W, D).
        rescale : bool
            Take the linear branch off the same maximum as the exact one.
        """
        sums, mass = linear
        if rescale:
            factor = (-self.most).exp()
            sums, mass = factor * sums, factor * mass
        return (self.sums + gates * sums) / (self.mass + mass)
