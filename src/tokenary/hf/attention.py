"""The attention and mask functions that our cache needs, registered under one name.

Importing this module registers them; a model uses them only inside `attached`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.cache import TokenLayer

NAME = "tokenary"


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Hand the padding through, (B, N) bool or None; each layer builds its own mask from it.

    transformers builds one mask for all layers of a type, which cannot be right once layers hold different tokens;
    without a registered mask function it would pass no mask at all, and padding would be attended to.
    """
    return attention_mask


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a `TokenLayer`, in the form that `AttentionInterface` asks for.

    Parameters
    ----------
    module, dropout, **kwargs
        Part of the interface; not used.
    query : Tensor
        (B, Hq, W, D), rotated.
    key, value : Tensor
        (B, Hkv, N, D) as `TokenLayer.update` returned them.
    attention_mask : Tensor, optional
        Padding, (B, >= W), from `padding_mask`.
    scaling : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    softcap, s_aux
        Must be None.

    Returns
    -------
    tuple of Tensor and None
        Output (B, W, Hq, D); no attention weights.

    Raises
    ------
    UnsupportedModelError
        If the model changes the logits (soft cap, sinks), or its keys do not come from a `TokenLayer`.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModelError("attention with a soft cap or learned sinks is not supported")
    layer: TokenLayer | None = getattr(key, "cache_layer", None)
    if layer is None:
        raise UnsupportedModelError("this model does not hand the cache's keys straight to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[2]
    info, policy = layer.shared[0], layer.policy
    prompt = info.prompt or layer.fill == 0
    mask = layer.mask(attention_mask, heads // kv_heads, query.dtype)
    shown = None
    if policy is not None and policy.observes:
        if prompt:
            _show_prompt(layer, query, key, scale)
        else:
            shown = _attend_and_show(layer, query, key, value, mask, scale)
    reader = policy if policy is not None and policy.attends else layer.reader
    if layer.store is not None:
        layer.queries = (query, scale) if layer.store.observes else None
        if any(layer.stored):
            if reader is None and info.visible is None:
                return _attend_stored(layer, query, key, value, mask, scale), None
            key, value = layer.whole()
    read = None if reader is None else reader.attend(layer, query, key, value, mask, scale)
    output = shown if read is None else read
    if output is not None:
        return output, None
    within = layer.sliding_window is None or width <= layer.sliding_window
    if layer.fill == 0 and layer.valid is None and info.ancestors is None and within:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        return output.transpose(1, 2), None
    # Query heads that share a key head become rows of one product: the keys are read once, not once a head.
    folded = query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])  # (B, Hkv, G * W, D)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return output.view(query.shape[0], heads, width, -1).transpose(1, 2), None


def _attend_and_show(
    layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend with the logits in hand, and leave them in the layer for the policy."""
    batch, heads, width, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)
    logits = torch.matmul(folded, key.transpose(2, 3)).float() * scale  # (B, Hkv, G * W, N)
    if mask is not None:
        logits += mask
    weights = logits.softmax(-1).to(value.dtype)
    layer.logits = logits.view(batch, key.shape[1], -1, width, key.shape[2])
    return torch.matmul(weights, value).view(batch, heads, width, -1).transpose(1, 2)


def _attend_stored(
    layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Let the store attend, sequence by sequence, to what it owns and to what lies open: (B, W, Hq, D)."""
    assert layer.store is not None
    batch, heads, width, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)  # (B, Hkv, G * W, D)
    found = []
    for row, (held, stored) in enumerate(zip(layer.held, layer.stored, strict=True)):
        # All slots before `held` may be seen; those between a shorter sequence and the pending rows are left out.
        parts = [slice(0, held - stored), slice(layer.n_open, None)]
        keys, values = (torch.cat([states[row, :, part] for part in parts], dim=1) for states in (key, value))
        term = None
        if mask is not None:
            term = torch.cat([mask[row, 0, :, stored:held], mask[row, 0, :, layer.fill :]], dim=1)
        found.append(layer.store.attend(row, folded[row], keys, values, term, scale))
    return torch.stack(found).view(batch, heads, width, -1).transpose(1, 2)


def _show_prompt(layer: TokenLayer, query: Tensor, key: Tensor, scale: float) -> None:
    """Show the policy each sequence's piece of prompt, without its padding."""
    assert layer.policy is not None
    positions = layer.shared[0].positions
    valid = layer.valid if layer.valid is not None or positions is None else positions >= 0
    for row in range(query.shape[0]):
        new = torch.arange(query.shape[2], device=query.device) if valid is None else valid[row].nonzero()[:, 0]
        if len(new):
            keys = torch.cat([key[row, :, : layer.held[row]], key[row, :, layer.fill :].index_select(1, new)], dim=1)
            layer.policy.observe_prompt(row, query[row].index_select(1, new), keys, scale)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, padding_mask)


@contextlib.contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use our attention inside the block, and its own again after it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
