from __future__ import annotations

import pytest
import torch

from tokenary.core.errors import UnsupportedModelError
from tokenary.decode.denoise_laws import net
from tokenary.hf.scatter_cache import ScatterCache, check_scatter, scatter_pass
from tokenary.models.tiny import tiny_lm

IDS = torch.tensor([[5, 9, 1, 7, 1, 1, 30, 44, 1, 12]])


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    found = net()
    found.set_attn_implementation(request.param)
    return found


def begun(model, *passes):
    cache = ScatterCache(model.config, IDS.shape[1])
    for computed, attended in passes:
        cache.begin(*(None if p is None else torch.tensor(p) for p in (computed, attended)))
    return cache


def test_a_full_pass_is_the_plain_model(model):
    cache = begun(model, (None, None))
    with torch.inference_mode():
        plain = model(IDS, use_cache=False).logits
    assert torch.equal(scatter_pass(model, cache, IDS), plain)
    assert cache.nbytes == 2 * 2 * IDS.shape[1] * 32 * 4
    at = torch.tensor([2, 8])
    assert torch.allclose(scatter_pass(model, cache, IDS, at), plain[:, at], atol=1e-5)


def test_recomputing_what_did_not_change_changes_nothing(model):
    """Any part of the positions, over the rest in the cache, gives the logits of the full pass: positions are true."""
    cache = begun(model, (None, None))
    plain = scatter_pass(model, cache, IDS)
    for part in ([0], [3, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8]):
        cache.begin(torch.tensor(part), None)
        assert torch.allclose(scatter_pass(model, cache, IDS), plain[:, part], atol=1e-5)


def test_a_window_is_the_text_without_what_it_leaves_out(model):
    """Attending to some positions is the same as a shorter text at the true positions, not at cropped ones."""
    kept = torch.tensor([0, 1, 2, 6, 7])
    cache = begun(model, (kept.tolist(), kept.tolist()))
    found = scatter_pass(model, cache, IDS)
    with torch.inference_mode():
        gathered = model(IDS[:, kept], position_ids=kept[None], use_cache=False).logits
        cropped = model(IDS[:, kept], use_cache=False).logits
    assert torch.allclose(found, gathered, atol=1e-5)
    assert not torch.allclose(found, cropped, atol=1e-2)


def test_rows_are_overwritten_in_place(model):
    cache = begun(model, (None, None))
    scatter_pass(model, cache, IDS)
    layer = cache.layers[0]
    before, storage = layer.keys.clone(), layer.keys.data_ptr()
    changed = IDS.clone()
    changed[0, 4] = 20
    cache.begin(torch.tensor([4]), None)
    scatter_pass(model, cache, changed)
    differs = (layer.keys != before).any(-1)[0, 0]
    assert differs.nonzero()[:, 0].tolist() == [4] and layer.keys.data_ptr() == storage


def test_logits_at_are_positions_of_the_text(model):
    cache = begun(model, (None, None))
    plain = scatter_pass(model, cache, IDS)
    cache.begin(torch.tensor([2, 4, 5, 8]), None)
    found = scatter_pass(model, cache, IDS, torch.tensor([4, 8]))
    assert torch.allclose(found, plain[:, [4, 8]], atol=1e-5)


def test_causal_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="looks only backwards"):
        check_scatter(tiny_lm().model)
    check_scatter(net())
