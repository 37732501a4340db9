"""The scorer of VisionSelector, which looks at the tokens alone; and the soft choice that it learns by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenary.core.errors import InputError, UnsupportedModelError


class Scorer(nn.Module):
    """Score a token by the mean over all tokens of q_i . k_j / sqrt(d / 2).

    The mean goes inside: q_i . mean(k) / sqrt(d / 2), which takes no N x N table.

    Parameters
    ----------
    width : int
        d, of the tokens as the language model reads them.
    seed : int
        Of the initial weights (normal, 1e-4; biases 0).
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query, self.key = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
            for layer in (self.query, self.key):
                nn.init.normal_(layer.weight, std=1e-4)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Score tokens (B, N, d), those of `allowed` (B, N) alone asked: (B, N).

        Raises
        ------
        UnsupportedModelError
            It was made for tokens of another width.
        """
        if x.shape[-1] != self.query.in_features:
            raise UnsupportedModelError(
                f"a scorer for tokens of {self.query.in_features} numbers, but these have {x.shape[-1]}"
            )
        there = x.new_ones(x.shape[:2]) if allowed is None else allowed.to(x.dtype)
        mean = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)  # (B, d)
        return (self.query(x) @ self.key(mean)[..., None])[..., 0] / math.sqrt(self.query.out_features)


def save_scorer(scorer: Scorer, file: Path | str) -> None:
    """Write a scorer as safetensors."""
    save_file({name: tensor.detach().contiguous() for name, tensor in scorer.state_dict().items()}, str(file))


def load_scorer(file: Path | str) -> Scorer:
    """Read a scorer, without gradients.

    Raises
    ------
    InputError
        There is no such file, or it holds something else.
    """
    try:
        state = load_file(str(file))
        scorer = Scorer(state["query.weight"].shape[1])
        scorer.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{file}: no scorer can be read from it") from error
    return scorer.eval().requires_grad_(False)


class SoftTopK(torch.autograd.Function):
    """Weights p_i = sigmoid(score_i + t) with t such that they sum to k, by 64 steps of bisection.

    The derivative goes through t: with v = p (1 - p), the gradient of score is g v - v (sum g v) / (sum v).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        """Scores (B, N) and k, 0 < k < N: weights (B, N)."""
        low, high = -scores.amax(-1, keepdim=True) - 10, -scores.amin(-1, keepdim=True) + 10
        for _ in range(64):
            middle = (low + high) / 2
            many = torch.sigmoid(scores + middle).sum(-1, keepdim=True) > count
            low, high = torch.where(many, low, middle), torch.where(many, middle, high)
        weights = torch.sigmoid(scores + (low + high) / 2)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """See above."""
        (weights,) = ctx.saved_tensors
        slope = weights * (1 - weights)
        pulled = grads[0] * slope
        return pulled - slope * pulled.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True), None
