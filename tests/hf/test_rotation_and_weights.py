"""What we read out of models: how they rotate, and the weights of a Llama."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.llama import llama_weights
from tokenary.hf.rotation import rotation_of
from tokenary.models import tiny_lm


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_rotation_is_that_of_the_model(family):
    model = tiny_lm(family=family).model
    states, positions = torch.randn(1, 4, 7, 8), torch.tensor([[0, 1, 5, 9, 40, 41, 300]])
    cos, sin = model.model.rotary_emb(states, positions)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    torch.testing.assert_close(rotation_of(model)(states, positions[:, None]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_positions_are_refused(family):
    with pytest.raises(UnsupportedModelError):
        rotation_of(tiny_lm(family=family).model)


def test_a_llama_made_of_its_weights_says_what_it_says():
    model = tiny_lm(layers=2).model
    w, ids = llama_weights(model, "tiny"), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    turn, n = rotation_of(model), ids.shape[1]

    def norm(x, weight):
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + w.eps).rsqrt()

    x = w.embedding[ids]
    for block in w.blocks:
        y = norm(x, block.attention_norm)
        q, k, v = ((y @ part.T).view(1, n, -1, w.head_dim).transpose(1, 2) for part in (block.q, block.k, block.v))
        q, k = (turn(part, torch.arange(n)) for part in (q, k))
        k, v = (part.repeat_interleave(w.heads // w.kv_heads, 1) for part in (k, v))
        logits = q @ k.mT / w.head_dim**0.5 + torch.full((n, n), float("-inf")).triu(1)
        x = x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ block.o.T
        y = norm(x, block.mlp_norm)
        x = x + (torch.nn.functional.silu(y @ block.gate.T) * (y @ block.up.T)) @ block.down.T
    torch.testing.assert_close(norm(x, w.norm) @ w.head.T, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_no_plain_llama_is_refused():
    with pytest.raises(UnsupportedModelError, match="without biases"):
        llama_weights(tiny_lm(family="qwen2").model, "qwen")
