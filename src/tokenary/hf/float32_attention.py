"""Attention in float32 under autocast, for training on a CPU.

torch's backward pass of attention takes several times as long there in bfloat16 as in float32. Importing this module
registers the function; a model uses it after ``set_attn_implementation(FLOAT32)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "tokenary_float32"


def float32_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' SDPA does, (B, H, N, D) each, in float32 whatever autocast says."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)


AttentionInterface.register(FLOAT32, float32_attention)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)
