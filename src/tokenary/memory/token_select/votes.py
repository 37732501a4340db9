"""How the heads of a layer vote for tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from tokenary.memory.read_base import highest

Vote = Literal["soft", "hard", "raw", "none"]


def votes(logits: Tensor, candidates: Tensor, count: Tensor, vote: Vote) -> Tensor:
    """Sum what the heads give to every candidate.

    Parameters
    ----------
    logits : Tensor
        (B, H, W, N) float32.
    candidates : Tensor
        Who may be voted for, (B, W, N) bool.
    count : Tensor
        k of a head's own top-k, for hard votes, (B, W) int64.
    vote : {"soft", "hard", "raw", "none"}
        ``soft``: each head's softmax over the candidates. ``hard``: one vote for each of a head's top-k candidates.
        ``raw``: plain logits. ``none``: nobody gets a vote.

    Returns
    -------
    Tensor
        (B, W, N) float32, -inf where there is no candidate. Rounded: in the first layer equal tokens have equal
        unrotated keys, and the earlier one shall win whatever the noise of the products.
    """
    out = ~candidates
    if vote == "none":
        return torch.full_like(logits[:, 0], float("-inf"))
    if vote == "raw":
        return logits.sum(1).round(decimals=3).masked_fill_(out, float("-inf"))
    if vote == "hard":
        logits = logits.round(decimals=3).masked_fill_(out[:, None], float("-inf"))
        given = highest(logits, count[:, None].expand(logits.shape[:-1])).float().sum(1)
    else:
        given = logits.masked_fill(out[:, None], float("-inf")).softmax(-1).sum(1).bfloat16().float()
    return given.masked_fill_(out, float("-inf"))


def pooled(scores: Tensor, ranks: Tensor, width: int) -> Tensor:
    """Give every candidate the most votes among its neighbours.

    Parameters
    ----------
    scores : Tensor
        (B, W, N), -inf where there is no candidate.
    ranks : Tensor
        Order of the tokens, (B, W, N) int64; neighbours are next to each other in it.
    width : int
        Neighbourhood, odd.
    """
    inside = scores > float("-inf")
    last = torch.full_like(ranks, scores.shape[-1])  # a place for those that are no candidates
    place = torch.where(inside, ranks, last)
    empty = scores.new_full((*scores.shape[:2], scores.shape[-1] + 1), float("-inf"))
    lined = empty.scatter(-1, place, scores)[..., :-1]
    most = max_pool1d(lined, width, stride=1, padding=width // 2)
    return most.gather(-1, ranks.clamp(min=0)).masked_fill_(~inside, float("-inf"))
