"""The two training objectives, and the likelihoods that they bound or give.

Masked diffusion. The bound of LLaDA and MDLM masks each of N tokens with probability t and weights by 1/t::

    -log p(x) <= E_{t ~ U(0,1)} (1/t) E_masks sum_{i masked} -log p(x_i | rest)

Since the integral of t^(k-1) (1-t)^(N-k) C(N,k) over t is 1/k, exactly the same bound is::

    -log p(x) <= N E_{k ~ U{1..N}} E_{|masked| = k} mean_{i masked} -log p(x_i | rest)

which has no division by a small t. `sample_masks` draws k stratified over the rows of a batch, `diffusion_nll` returns
the mean over the masked positions: an unbiased estimate of the bound in nats a token.

Any-subset autoregression. The order is: visible tokens left to right, then masked tokens left to right (one of 2^N
orders, not N!). Each position has a content stream, its token, which sees itself and all of lower rank, and a query
stream, [MASK] at the same position, which sees the contents of lower rank and itself. Both are rows of one sequence of
2N tokens under a 4D mask, so a plain transformer runs them; visible tokens see each other both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tokenary.models.text_diffusion.net import TextDiffusionModel


def sample_masks(rows: int, length: int, generator: torch.Generator, share: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Draw masked sets of a uniform size, stratified over the rows.

    Parameters
    ----------
    rows, length : int
        Shape of the batch.
    generator : torch.Generator
        Source of the randomness; the result is on its device.
    share : tuple of float
        Sizes are uniform on this part of 1..length; the default is the diffusion bound's.

    Returns
    -------
    Tensor
        (rows, length) bool, True where masked; at least one a row.
    """
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    low, high = share
    stratum = torch.randperm(rows, generator=generator, device=device)  # shuffled: each row alone is uniform too
    at = low + (high - low) * (offset + stratum) / rows
    size = (1 + (at * length).long()).clamp_(max=length)
    order = torch.rand(rows, length, generator=generator, device=device).argsort(1)
    return torch.zeros(rows, length, dtype=torch.bool, device=device).scatter_(
        1, order, torch.arange(length, device=device) < size[:, None]
    )


def diffusion_nll(model: TextDiffusionModel, input_ids: Tensor, masked: Tensor) -> Tensor:
    """Mean cross-entropy on the masked positions of each row.

    Parameters
    ----------
    model : TextDiffusionModel
        Gives logits about the position they stand at.
    input_ids : Tensor
        (B, N) long, the clean tokens.
    masked : Tensor
        (B, N) bool, from `sample_masks`.

    Returns
    -------
    Tensor
        (B,) nats; its mean over draws of `masked` bounds the negative log-likelihood a token.
    """
    noisy = input_ids.masked_fill(masked, model.config.mask_token_id)
    nll = _nll(model(input_ids=noisy, use_cache=False).logits, input_ids)
    return (nll * masked).sum(1) / masked.sum(1)


def any_subset_ranks(masked: Tensor) -> Tensor:
    """Rank of each position, (B, N) long: visible ones first, each group left to right."""
    visible = ~masked
    count = visible.sum(1, keepdim=True)
    return torch.where(visible, visible.cumsum(1) - 1, count + masked.cumsum(1) - 1)


def two_stream_mask(rank: Tensor, masked: Tensor) -> Tensor:
    """Who sees whom among N contents and N queries.

    Parameters
    ----------
    rank : Tensor
        (B, N) long. Equal ranks do not see each other from the query stream: give all undecoded positions one last
        rank to draft them independently.
    masked : Tensor
        (B, N) bool; the others see each other both ways.

    Returns
    -------
    Tensor
        (B, 1, 2N, 2N) bool, True where row may look at column.
    """
    size = rank.shape[1]
    row, column = rank[:, :, None], rank[:, None, :]
    visible = ~masked
    content = (column <= row) | (visible[:, :, None] & visible[:, None, :])  # (B, N, N)
    own = torch.eye(size, dtype=torch.bool, device=rank.device).expand_as(content)
    top = torch.cat([content, torch.zeros_like(content)], dim=2)
    bottom = torch.cat([column < row, own], dim=2)
    return torch.cat([top, bottom], dim=1)[:, None]


def any_subset_logits(model: TextDiffusionModel, input_ids: Tensor, rank: Tensor, masked: Tensor) -> Tensor:
    """Logits (B, N, V) of each masked position given the tokens of lower rank, all in one pass.

    Parameters
    ----------
    model : TextDiffusionModel
        Trained with ``objective="any-subset"``.
    input_ids : Tensor
        (B, N) long. A token is seen only by positions of higher rank.
    rank, masked : Tensor
        As for `two_stream_mask`. Logits at visible positions mean nothing.
    """
    size = input_ids.shape[1]
    queries = torch.full_like(input_ids, model.config.mask_token_id)
    positions = torch.arange(size, device=input_ids.device).repeat(2)[None]
    return model(
        input_ids=torch.cat([input_ids, queries], dim=1),
        position_ids=positions,
        attention_mask=two_stream_mask(rank, masked),
        use_cache=False,
        logits_to_keep=size,
    ).logits


def any_subset_nll(model: TextDiffusionModel, input_ids: Tensor, masked: Tensor) -> Tensor:
    """Exact ``-log p(masked tokens | visible tokens)`` under the sorted order, a masked token.

    Returns
    -------
    Tensor
        (B,) nats a masked token; times the number of masked tokens it is the joint, not a bound.
    """
    nll = _nll(any_subset_logits(model, input_ids, any_subset_ranks(masked), masked), input_ids)
    return (nll * masked).sum(1) / masked.sum(1)


def _nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), input_ids.flatten(), reduction="none").view_as(input_ids)
