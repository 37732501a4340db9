"""The weights of a Llama by their part in it, for arithmetic of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from tokenary.core.errors import UnsupportedModelError


@dataclass(frozen=True)
class LlamaBlock:
    """One layer; linear weights are (out, in).

    Attributes
    ----------
    attention_norm, mlp_norm : Tensor
        (K,).
    q, k, v, o, gate, up, down : Tensor
        Queries (Hq D, K), keys and values (Hkv D, K), output (K, Hq D), and the three of the gated MLP.
    """

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class LlamaWeights:
    """All of a Llama.

    Attributes
    ----------
    embedding, head : Tensor
        (V, K).
    norm : Tensor
        (K,), the last one.
    blocks : list of LlamaBlock
        Layers.
    heads, kv_heads, head_dim : int
        Of attention.
    theta, eps : float
        Base of the rotary frequencies; what the norms add to the mean square.
    """

    embedding: Tensor
    head: Tensor
    norm: Tensor
    blocks: list[LlamaBlock]
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    eps: float


def llama_weights(model: PreTrainedModel, name: str) -> LlamaWeights:
    """Take a Llama with ordinary rotary positions, SiLU and no biases apart.

    Parameters
    ----------
    model : PreTrainedModel
        Its weights are referred to, not copied.
    name : str
        For the error.

    Raises
    ------
    UnsupportedModelError
        Another architecture.
    """
    config: Any = model.config
    if not isinstance(model, LlamaForCausalLM) or config.attention_bias or config.mlp_bias:
        raise UnsupportedModelError(f"{name} is no Llama without biases")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or config.hidden_act != "silu":
        raise UnsupportedModelError(f"{name} has scaled rotary positions, or another activation")
    inner: Any = model.model
    blocks = [
        LlamaBlock(
            attention_norm=layer.input_layernorm.weight,
            q=layer.self_attn.q_proj.weight,
            k=layer.self_attn.k_proj.weight,
            v=layer.self_attn.v_proj.weight,
            o=layer.self_attn.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=layer.mlp.gate_proj.weight,
            up=layer.mlp.up_proj.weight,
            down=layer.mlp.down_proj.weight,
        )
        for layer in inner.layers
    ]
    heads = int(config.num_attention_heads)
    return LlamaWeights(
        embedding=model.get_input_embeddings().weight,  # type: ignore[arg-type]
        head=model.get_output_embeddings().weight,
        norm=inner.norm.weight,
        blocks=blocks,
        heads=heads,
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        theta=float(rope.get("rope_theta") or config.rope_theta),
        eps=float(config.rms_norm_eps),
    )
