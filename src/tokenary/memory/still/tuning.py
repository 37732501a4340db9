"""The second stage: low-rank updates of the projections, by the loss of the next token, hybrid attention in place.

    W + (SCALE / rank) B A        A random, B zero at first; W, and unless wanted the maps, stay as they are

The updates are added to the projections in the end: what comes out is another model, to be used with the same maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenary.core.errors import RecipeError
from tokenary.hf.cache import PassInfo, TokenCache
from tokenary.hf.hooks import attention_modules
from tokenary.hf.target import attached
from tokenary.memory.still import STILL
from tokenary.models.low_rank import LowRank

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LR, SCALE = 1e-4, 16.0


def tune(
    model: PreTrainedModel,
    policy: STILL,
    texts: Sequence[Sequence[int]],
    rank: int = 8,
    train_maps: bool = False,
    seed: int = 0,
) -> Iterator[float]:
    """Train updates on texts, each read once; after the last they are part of the model.

    Parameters
    ----------
    model : PreTrainedModel
        Not packed for inference (``load(..., optimize=False)``); changed in place.
    policy : STILL
        Prepared for it. Layers with maps get updates.
    texts : sequence of token ids
        One update of all weights each.
    rank : int
        Of the updates of queries, keys, values and output.
    train_maps : bool
        Let maps and gates learn too.
    seed : int
        Of the first weights.

    Yields
    ------
    float
        Loss of each text in nats a token, before its update.

    Raises
    ------
    RecipeError
        If the policy was not prepared.
    """
    if policy.maps is None:
        raise RecipeError("still belongs to a model: call prepare(model) first")
    attention: Any = attention_modules(model)
    model.requires_grad_(False)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        places = [(attention[layer], name) for layer in policy.maps for name in PROJECTIONS]
        updates = [LowRank(getattr(module, name), rank, scale=SCALE / rank) for module, name in places]
    for (module, name), update in zip(places, updates, strict=True):
        setattr(module, name, update)
    weights = [p for update in updates for p in (update.A, update.B)]
    if train_maps:
        weights += [p for maps in policy.maps.values() for p in maps.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    try:
        for ids in texts:
            with torch.inference_mode(False), torch.enable_grad():
                loss = next_token_loss(model, policy, ids)
                loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
    finally:
        for (module, name), update in zip(places, updates, strict=True):
            setattr(module, name, update.merged())
        for maps in policy.maps.values():
            maps.requires_grad_(False)


def next_token_loss(model: PreTrainedModel, policy: STILL, ids: Sequence[int]) -> Tensor:
    """Return the mean loss of a text in nats a token, read in one pass with hybrid attention; it has a gradient."""
    cache = TokenCache(model.config, policy.attach(model.config, model.dtype))
    cache.begin(PassInfo(prompt=True))
    real = torch.tensor([list(ids)], device=model.device)
    with attached(model):
        logits = model(real, past_key_values=cache, use_cache=True).logits
    return nn.functional.cross_entropy(logits[0, :-1].float(), real[0, 1:])
