"""What the package asks of layers and of transformers' own SAM: a version that differs breaks here."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, ViTConfig, ViTModel

from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.hooks import attention_modules, hidden_states_of, watched_heads
from tokenary.hf.rotation import rotated
from tokenary.hf.sam import sam_heads
from tokenary.models.tiny import tiny_lm


def test_attention_is_called_with_the_hidden_states_of_the_layer() -> None:
    lm, seen = tiny_lm(), []
    handle = attention_modules(lm.model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(hidden_states_of(args, kwargs)), with_kwargs=True
    )
    with torch.inference_mode():
        states = lm.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    handle.remove()
    model: LlamaForCausalLM = lm.model
    torch.testing.assert_close(seen[0], model.model.layers[1].input_layernorm(states[1]))


def test_watched_queries_and_keys_give_the_attention_of_the_model() -> None:
    lm, found = tiny_lm(), {}
    lm.model.set_attn_implementation("eager")
    attention = attention_modules(lm.model)[0]
    handles = [
        watched_heads(attention, kind, lambda states, kind=kind: found.__setitem__(kind, states))
        for kind in ("queries", "keys")
    ]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        weights = lm.model(ids, output_attentions=True).attentions[0]
        embeddings = lm.model.model.rotary_emb(found["queries"], torch.arange(4)[None])
    for handle in handles:
        handle.remove()
    queries, keys = (rotated(lm.model, found[kind], embeddings) for kind in ("queries", "keys"))
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (queries @ keys.mT * attention.scaling).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(logits.softmax(-1), weights, rtol=1e-5, atol=1e-6)


def test_the_attention_of_a_vit_is_watched_too() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    vit = ViTModel(ViTConfig(num_hidden_layers=1, **sizes)).eval()
    found: list[torch.Tensor] = []
    attention = next(module for module in vit.modules() if hasattr(module, "q_proj"))
    with torch.inference_mode():
        watched_heads(attention, "values", found.append)
        vit(torch.zeros(3, 3, 8, 8))
    assert found[0].shape == (3, 2, 5, 8)


def test_what_has_no_such_projections_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no keys"):
        watched_heads(torch.nn.Linear(2, 2), "keys", print)


def test_sams_decoder_takes_places_and_prompts() -> None:
    encoder, decoder = sam_heads(side=64, width=32, heads=2, intermediate=16)
    sparse, dense = encoder(torch.rand(1, 3, 1, 2) * 64, torch.ones(1, 3, 1, dtype=torch.int), None, None)
    calls = []
    decoder.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    places = encoder.shared_embedding(torch.rand(4, 4, 2)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits, scores = decoder(torch.rand(1, 32, 4, 4), places, sparse, dense, True)
    assert logits.shape[:3] == (*scores.shape[:2], 3) == (1, 3, 3)
    assert {"image_embeddings", "image_positional_embeddings"} <= calls[0].keys()
