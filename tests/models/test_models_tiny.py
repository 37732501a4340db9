from __future__ import annotations

import pytest
import torch

from tokenary.core.errors import OptionError
from tokenary.models.tiny import FAMILIES, tiny_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_and_global_generator_untouched(family):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a = tiny_lm(1, family=family)
    assert torch.equal(torch.rand(3), expected)
    b, other = tiny_lm(1, family=family), tiny_lm(2, family=family)
    assert a.fingerprint == b.fingerprint != other.fingerprint
    states = a.model.state_dict(), b.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert a.dtype == torch.float32 and not a.model.training and a.eos_token_ids == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_something(family):
    lm = tiny_lm(family=family, layers=3)
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lm.model(ids).logits[0]
    assert logits.shape == (40, 97) and 1.0 < logits.std() < 10.0
    best = logits.argmax(-1)
    assert (best == ids[0]).float().mean() < 0.5  # does not just repeat its input
    assert len(best.unique()) > 5
    changed = ids.clone()
    changed[0, 30] = (changed[0, 30] + 1) % 97
    with torch.no_grad():
        assert not torch.allclose(lm.model(changed).logits[0, -1], logits[-1], atol=1e-3)  # attention matters


def test_families_have_what_they_are_for():
    gemma = tiny_lm(family="gemma3", layers=4).model
    assert gemma.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert gemma.config.sliding_window == 8
    qwen = tiny_lm(family="qwen2").model
    assert qwen.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    llama = tiny_lm(heads=8, kv_heads=2, hidden=64).model
    assert llama.model.layers[0].self_attn.k_proj.weight.shape == (16, 64)
    gpt2 = tiny_lm(family="gpt2").model
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


@pytest.mark.parametrize("options", [{"family": "bert"}, {"hidden": 30}, {"hidden": 12}, {"kv_heads": 3}])
def test_wrong_options(options):
    with pytest.raises(OptionError):
        tiny_lm(**options)
