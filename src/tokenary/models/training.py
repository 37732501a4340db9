"""What the trainings of the vision networks share: the course of the learning rate, precision, optimisers, state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class State:
    """Where a run stands.

    Attributes
    ----------
    step : int
        Steps taken.
    seconds : float
        Spent on them.
    curve : list of dict
        What was measured on the way.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to zero."""
    if progress < warmup:
        return max(0.02, progress / warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def muon_and_adamw(
    matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of blocks and AdamW for all else, at one learning rate."""
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def fast_products() -> contextlib.AbstractContextManager[Any]:
    """Multiply in bfloat16 where the processor has instructions for it."""
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cpu", dtype=torch.bfloat16) if fast else contextlib.nullcontext()
