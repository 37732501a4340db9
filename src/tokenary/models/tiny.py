"""Tiny random nets: every architecture that matters, in milliseconds, for laws and tests."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tokenary.core.errors import OptionError
from tokenary.models.lm import LM

FAMILIES = ("llama", "gemma3", "qwen2", "gpt2")


def tiny_lm(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    family: str = "llama",
    context: int = 512,
) -> LM:
    """Build a random causal language model in float32 on the CPU, without tokenizer and without end token.

    Weights are drawn large enough that attention looks at different places and that two logits are rarely near each
    other; biases and norms are random too, so nothing that they do goes untested. The global random generator is left
    as it was.

    Parameters
    ----------
    seed : int
        The same seed gives the same weights.
    layers, hidden, heads, kv_heads, vocab, context : int
        Sizes; ``kv_heads`` is ignored by gpt2, which has no grouped heads.
    family : {"llama", "gemma3", "qwen2", "gpt2"}
        gemma3 alternates sliding (window 8) and global layers; qwen2 has biases on queries, keys and values; gpt2 has
        learnt positions instead of rotary ones.

    Raises
    ------
    OptionError
        An unknown family, or sizes that do not divide.
    """
    if family not in FAMILIES:
        raise OptionError("family", family, f"one of {', '.join(FAMILIES)}")
    if hidden % heads or (hidden // heads) % 2:
        raise OptionError("hidden", hidden, f"an even multiple of heads={heads}")
    if heads % kv_heads:
        raise OptionError("kv_heads", kv_heads, f"a divisor of heads={heads}")
    config = _config(family, layers, hidden, heads, kv_heads, vocab, context)
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight")):
                # gemma multiplies embeddings by sqrt(hidden): unless they are small, the tied head repeats the input
                noise *= 0.05 if family == "gemma3" else 0.5
            elif parameter.dim() == 1:  # norms (those of gemma add the one themselves) and biases
                noise *= 0.2
                if name == "model.norm.weight" and family == "gemma3":
                    noise += 9.0  # brings the logits of the small tied head to the size of the other families
                elif name.endswith("weight") and family != "gemma3":
                    noise += 1.0
            else:
                noise *= 1.5 / parameter.shape[0 if family == "gpt2" else 1] ** 0.5  # gpt2 stores (in, out)
            parameter.copy_(noise)
            digest.update(parameter.numpy().tobytes())
    return LM(f"tiny-{family}-{seed}", model, None, digest.hexdigest(), "random weights")


def _config(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, context: int
) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if family == "gpt2":
        shared |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, **shared)
    shared |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }
    if family == "llama":
        return LlamaConfig(**shared)
    if family == "qwen2":
        return Qwen2Config(**shared)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return Gemma3TextConfig(sliding_window=8, layer_types=kinds, query_pre_attn_scalar=hidden // heads, **shared)
