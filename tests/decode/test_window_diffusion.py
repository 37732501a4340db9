from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.core.sampling import Sampler
from tokenary.decode.confidence import Confidence
from tokenary.decode.denoise import Denoise
from tokenary.decode.denoise_laws import MASK, RAGGED, net, run, texts
from tokenary.decode.local_leap import LocalLeap
from tokenary.decode.window_diffusion import WindowDiffusion, first_masks, in_window
from tokenary.hf.scatter_cache import ScatterCache, scatter_pass
from tokenary.hf.strategy import Task

ONE = Confidence(block=0)


def pair(model, unmasker, window, prompt, new=24, end=()):
    loop = Denoise(Task(model, None, [prompt], Sampler(), new, end), unmasker, window)
    for _ in loop:
        pass
    return loop


def slow(model, prompt, new, width, active, cycle, transient=True):
    """The variant for LLaDA in plain attention: a dense mask and the whole text in every pass, keys kept by hand.

    Positions that are not computed keep the hidden states, layer by layer, of the pass that computed them last: so the
    keys and values that they offer are those of that pass.
    """
    ids, computed_at_refresh = [*prompt, *[MASK] * new], []
    layers = model.model.layers
    stored = None
    step = 0
    while MASK in ids:
        masks = [i for i, t in enumerate(ids) if t == MASK]
        decoded = [i for i, t in enumerate(ids) if t != MASK]
        if step % cycle == 0:
            rows, seen = list(range(len(ids))), list(range(len(ids)))
        else:
            if step % cycle == 1:
                seen = sorted(decoded + masks[:width])
                phase, keep = [], computed_at_refresh
            else:
                keep = phase
            rows = sorted(set(masks[:active]) | set(keep if transient else []))
        with torch.no_grad():
            hidden = model.model.embed_tokens(torch.tensor([ids]))
            rotary = model.model.rotary_emb(hidden, torch.arange(len(ids))[None])
            stored = stored or [None] * len(layers)
            for n, layer in enumerate(layers):
                if stored[n] is None:
                    stored[n] = hidden.clone()
                stored[n][:, rows] = hidden[:, rows]
                attention_mask = torch.full((1, 1, len(ids), len(ids)), float("-inf"))
                attention_mask[..., seen] = 0
                hidden = layer(stored[n], attention_mask=attention_mask, position_embeddings=rotary)
            logits = model.lm_head(model.model.norm(hidden))[0].double()
        logits[:, MASK] = float("-inf")
        sure = {i: float(logits[i].softmax(-1).max()) for i in rows if ids[i] == MASK}
        best = max(sure, key=lambda i: (sure[i], -i))
        ids[best] = int(logits[best].argmax())
        if step % cycle == 0:
            computed_at_refresh = [best]
        else:
            phase.append(best)
        step += 1
    return ids


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize(("width", "active", "cycle"), [(8, 3, 4), (12, 5, 9), (4, 4, 3)])
def test_it_is_the_slow_formulation(width, active, cycle, transient):
    model = net()
    for prompt in (RAGGED[0], RAGGED[2]):
        window = WindowDiffusion(window=width, active=active, refresh=cycle, transient=transient)
        found = pair(model, ONE, window, prompt)
        expected = slow(model, prompt, 24, width, active, cycle, transient)
        assert found.sequences[0].ids == expected
        assert expected != pair(model, ONE, None, prompt).sequences[0].ids  # else the window is not tried


@pytest.mark.parametrize("unmasker", [ONE, Confidence(threshold=0.8), LocalLeap(anchor=0.9, relaxed=0.7)])
def test_refreshing_always_is_the_full_decoder_exactly(unmasker):
    """Every logit is equal bit for bit, and so is the text."""
    model, prompt = net(), RAGGED[0]
    ids = torch.tensor([[*prompt, *[MASK] * 24]])
    cache = ScatterCache(model.config, ids.shape[1])
    cache.begin(None, None)
    with torch.inference_mode():
        assert torch.equal(scatter_pass(model, cache, ids), model(ids, use_cache=False).logits)
    always = WindowDiffusion(**WindowDiffusion.everything)
    assert pair(model, unmasker, always, prompt).sequences == pair(model, unmasker, None, prompt).sequences


def test_rows_are_those_that_it_says():
    """One pass of T rows, then the active masks and what was decoded since; a cache of T positions."""
    prompt, new, active, cycle = RAGGED[0], 24, 3, 8
    loop = pair(net(), ONE, WindowDiffusion(window=6, active=active, refresh=cycle), prompt, new)
    rows = [computed for computed, _ in loop.sequences[0].trace.per_pass]
    total = len(prompt) + new
    for start in range(0, new, cycle):
        left = new - start
        expected = [total, min(active, left - 1) + 1]
        expected += [min(active, left - n) + n - 1 for n in range(2, cycle)]
        assert rows[start : start + cycle] == expected
    config = net().config
    assert loop.peak_bytes == 2 * 4 * config.num_hidden_layers * total * config.hidden_size


def test_local_leap_leaps_in_a_window():
    model = net()
    both = pair(model, LocalLeap(anchor=0.6, relaxed=0.3), WindowDiffusion(window=12, active=8, refresh=4), RAGGED[0])
    assert MASK not in both.sequences[0].ids
    assert both.sequences[0].trace.passes < 24


def test_early_stop_drops_what_is_behind_an_end_token():
    model, prompt = net(), RAGGED[0]
    window = {"window": 24, "active": 24, "refresh": 4}
    plain = pair(model, ONE, WindowDiffusion(**window), prompt)
    order = [
        emission.at[0] for emissions in Denoise(plain.task, ONE, WindowDiffusion(**window)) for emission in emissions
    ]
    late = max(order[:8])  # committed early, though it stands far right
    end = plain.sequences[0].new_ids[late]
    fast = pair(model, ONE, WindowDiffusion(**window, early_stop=True), prompt, end=[end]).sequences[0]
    assert fast.finish == "stop" and fast.new_ids[-1] == end and end not in fast.new_ids[:-1]
    # every pass after the cut computes the shorter text
    assert max(rows for rows, _ in fast.trace.per_pass[order.index(late) + 1 :]) <= len(prompt) + late + 1


def test_far_out_of_order_tokens_stay_in_the_window():
    masked = torch.tensor([False, True, True, False, True, True, False, True])
    assert in_window(masked, 2).tolist() == [0, 1, 2, 3, 6]
    assert first_masks(masked, 3).nonzero()[:, 0].tolist() == [1, 2, 4]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 45))
def test_ranks_count_masks_not_positions(bits, count):
    masked = torch.tensor(bits)
    expected = [i for i, bit in enumerate(bits) if bit][:count]
    assert first_masks(masked, count).nonzero()[:, 0].tolist() == expected
    assert in_window(masked, count).tolist() == sorted([*expected, *(i for i, bit in enumerate(bits) if not bit)])


def test_prompts_in_a_batch_are_written_one_after_the_other():
    model, window = net(), WindowDiffusion(window=8, active=3, refresh=4)
    alone = [pair(model, None, window, prompt).sequences[0].ids for prompt in RAGGED]
    assert texts(run(model, window, RAGGED)) == alone


@pytest.mark.parametrize("options", [{"active": 65}, {"window": 0}, {"refresh": 0}, {"active": 0}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        WindowDiffusion(**options)
