"""How the scorer learns: what the model reads is weighed by a soft choice, which a second loss hardens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenary.reduce.idpruner.scorer import Scorer, SoftTopK


def train_scorer(
    scorer: Scorer,
    features: Sequence[Tensor],
    answer_loss: Callable[[int, Tensor], Tensor],
    *,
    share: float = 0.2,
    lr: float = 5e-5,
    warmup: float = 0.03,
    hardening: tuple[float, float] = (0.1, 2.0),
) -> list[tuple[float, float]]:
    """Train a scorer; encoder, projector and language model stay as they are.

    Every token stays in the sequence, multiplied by its weight p, and the weights sum to a fifth of the tokens. The
    loss is that of the answer plus w times the binary cross-entropy of p with the hard choice by the same scores, and w
    rises linearly: soft and hard choice come to be one.

    Parameters
    ----------
    scorer : Scorer
        Trained in place.
    features : sequence of Tensor
        (B, N, d) tokens as the language model reads them, one batch a step.
    answer_loss : callable
        ``answer_loss(step, weighed)`` is the cross-entropy of the answers to the batch of that step, with weighed
        tokens (B, N, d) in the place of its tokens.
    share : float
        Of tokens that the weights sum to.
    lr : float
        Largest learning rate (AdamW), behind a linear warm-up; it falls as a cosine.
    warmup : float
        Share of the steps.
    hardening : (float, float)
        w at the first and the last step.

    Returns
    -------
    list of (float, float)
        Loss of the answers and of the hardening, by step.
    """
    steps, (first, last) = len(features), hardening
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warmup))
    scorer.requires_grad_(True).train()
    history = []
    for step, x in enumerate(features):
        count = max(1, math.floor(share * x.shape[1]))
        scores = scorer(x)
        weights = cast(Tensor, SoftTopK.apply(scores, count))
        hard = torch.zeros_like(weights).scatter(1, scores.detach().topk(count, dim=-1).indices, 1.0)
        answers = answer_loss(step, x * weights[..., None])
        hardness = F.binary_cross_entropy(weights.clamp(1e-6, 1 - 1e-6), hard)
        loss = answers + (first + (last - first) * step / max(1, steps - 1)) * hardness
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append((float(answers.detach()), float(hardness.detach())))
    scorer.eval().requires_grad_(False)
    return history


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate at a step as a share of the largest."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
