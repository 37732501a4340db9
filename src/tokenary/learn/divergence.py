"""The divergence of chunks, and the tokens that it is summed over: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div


def top_columns(logits: Tensor, count: int) -> Tensor:
    """Return the tokens of the greatest logits over all positions (P, V), at most `count` of them, ascending."""
    if count >= logits.shape[-1]:
        return torch.arange(logits.shape[-1], device=logits.device)
    return logits.amax(0).topk(count).indices.sort().values


def divergence(student: Tensor, teacher: Tensor, reverse: bool = False) -> Tensor:
    """Return KL(teacher || student) of log-probabilities (C, K), or the other way round, (C,).

    Rows need not be normalised: an average of log-probabilities over several positions is not, and then the result may
    be negative.
    """
    given, of = (teacher, student) if reverse else (student, teacher)
    return kl_div(given, of, reduction="none", log_target=True).sum(-1)
