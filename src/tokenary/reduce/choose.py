"""Choosing tokens by their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenary.core.token_map import Select


def top(scores: Tensor, keep: int, allowed: Tensor | None = None) -> Select:
    """Choose the tokens with the largest scores, in their order; of equal ones the first.

    Parameters
    ----------
    scores : Tensor
        (B, N), finite.
    keep : int
        M; a row with fewer allowed tokens is filled up with outputs without a source.
    allowed : Tensor, optional
        (B, N) bool.

    Returns
    -------
    Select
        (B, M, N).
    """
    if allowed is not None:
        scores = scores.double().masked_fill(~allowed, float("-inf"))
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    if allowed is None or bool((allowed.sum(-1) >= keep).all()):
        return Select(chosen.sort(-1).values, scores.shape[-1], validate=False)
    return chosen_in_order(chosen, allowed.gather(-1, chosen), scores.shape[-1])


def chosen_in_order(index: Tensor, valid: Tensor, num_tokens: int) -> Select:
    """Choose tokens ``index`` (B, M) where ``valid`` (B, M), in their order, those that are not valid at the end."""
    order = index.masked_fill(~valid, num_tokens).sort(-1).values
    there = order < num_tokens
    if bool(there.all()):
        return Select(order, num_tokens, validate=False)
    return Select(order.masked_fill(~there, 0), num_tokens, there, validate=False)


def mask_to_select(kept: Tensor) -> Select:
    """Choose the tokens that are true in ``kept`` (B, N), in their order; rows may differ in number."""
    count = int(kept.sum(-1).max()) if kept.numel() else 0
    index = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return chosen_in_order(index, kept.gather(-1, index), kept.shape[-1])
