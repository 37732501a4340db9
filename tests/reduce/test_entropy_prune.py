"""EntropyPrune: eigenvalues against singular values one token at a time, the budget, the collapse, the ragged cache."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.core.laws import check
from tokenary.hf.hooks import decoder_layers, edited_layer
from tokenary.models.bench_vlm import VOCABULARY
from tokenary.models.tiny import tiny_lm
from tokenary.reduce.base import Context
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.entropy_prune import (
    EntropyCurve,
    EntropyPrune,
    collapse,
    head_entropy,
    head_gram,
    layer_entropy,
)
from tokenary.reduce.law_tools import pictures, toy_tokens, toy_vlm


def slow_score(heads, normalise):
    """The entropy of one token (H, d), from the singular values of its centred matrix."""
    h, d = heads.shape
    rows = np.asarray(heads, dtype=np.float64)
    if d > 128:
        group = d // 128
        rows = np.array([[row[g * group : (g + 1) * group].mean() for g in range(128)] for row in rows])
    rows = rows - sum(rows) / h
    found = list(np.linalg.svd(rows, compute_uv=False) ** 2 / h)
    found += [0.0] * (h - len(found))
    total = sum(found)
    if normalise == "trace":
        found = [value / max(total, 1e-10) for value in found]
    return -sum(max(v, 1e-10) * math.log(max(v, 1e-10)) for v in found) / math.log(h)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9999), st.integers(2, 9), st.sampled_from([1, 3, 16, 256]), st.sampled_from(["none", "trace"]),
    st.sampled_from([0.01, 1.0, 20.0]),
)  # fmt: skip
def test_entropy_is_that_of_one_token_after_the_other(seed, heads, width, normalise, scale):
    states = torch.randn(2, 5, heads, width, generator=torch.Generator().manual_seed(seed)) * scale
    found = head_entropy(states, normalise)
    assert found.dtype == torch.float64 and found.shape == (2, 5)
    for picture in range(2):
        for token in range(5):
            expected = slow_score(states[picture, token].numpy(), normalise)
            assert abs(float(found[picture, token]) - expected) < 1e-8 * max(1.0, abs(expected))


def test_the_small_product_has_the_eigenvalues_of_the_large_one():
    states = torch.randn(7, 32, 128, generator=torch.Generator().manual_seed(0)) * 2
    centred = states.double() - states.double().mean(-2, keepdim=True)
    primal = torch.linalg.eigvalsh(centred.mT @ centred / 32)  # (7, 128)
    dual = torch.linalg.eigvalsh(head_gram(states))  # (7, 32)
    torch.testing.assert_close(dual, primal[:, -32:], atol=1e-8, rtol=0)
    assert primal[:, :-32].abs().max() < 1e-8


def test_only_the_textbook_score_is_blind_to_norms():
    states = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(1))
    scaled = states * torch.tensor([0.2, 1.0, 3.0, 9.0, 0.5, 2.0])[:, None, None]
    torch.testing.assert_close(head_entropy(scaled, "trace"), head_entropy(states, "trace"), atol=1e-7, rtol=1e-7)
    assert (head_entropy(states, "trace") > 0).all() and (head_entropy(states, "trace") < 1).all()
    one = states[:, :1] * torch.tensor([4.0, 8.0, 16.0])[:, None, None]
    assert (head_entropy(one).diff() < 0).all()  # released: beyond 1/e the larger query has the smaller score
    same = torch.ones(1, 1, 4, 8)
    assert head_entropy(same, "trace").abs().max() < 1e-6
    spread = torch.eye(4, 8)[None, None]  # centred: three equal eigenvalues
    torch.testing.assert_close(
        head_entropy(spread, "trace"), torch.full((1, 1), math.log(3) / math.log(4)).double(), atol=1e-6, rtol=0
    )


def test_shared_keys_need_not_be_repeated():
    keys = torch.randn(2, 30, 3, 16, generator=torch.Generator().manual_seed(2))
    repeated = keys.repeat_interleave(4, dim=2)
    ratio = head_entropy(repeated) * math.log(12) / (head_entropy(keys) * math.log(3))
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("budget", "kept"), [(192, 166), (128, 98), (64, 29), (576, 576)])
def test_the_budget_is_an_average_over_layers(budget, kept):
    context = Context((24, 24), layer=1, n_layers=32)
    assert EntropyPrune(keep=budget).count(576, context) == kept
    assert EntropyPrune(keep=budget, budget="kept").count(576, context) == budget
    assert kept == 576 or 0 <= 32 * budget - (2 * 576 + 30 * kept) < 30


def test_a_budget_that_leaves_nothing_is_refused():
    context = Context((24, 24), layer=1, n_layers=32)
    with pytest.raises(OptionError, match="at least 37 of 576"):
        EntropyPrune(keep=36).count(576, context)
    assert EntropyPrune(keep=37).count(576, context) == 1
    with pytest.raises(OptionError, match="kept"):
        EntropyPrune(keep=64).count(576, replace(context, layer=31))
    for at in ("encoder", "vision:50%"):
        with pytest.raises(OptionError, match="over whose layers"):
            EntropyPrune().attach(toy_vlm(), at)
        with EntropyPrune(keep=16, budget="kept").attach(toy_vlm(), at) as reduced:
            seen = reduced.image_tokens(pictures(1))
            reduced(seen, torch.tensor([VOCABULARY.prompt("is there a red star ?")]))
            assert reduced.kept == [16]


@pytest.mark.parametrize("n", [3, 11, 40])
def test_the_entropy_of_a_layer(n):
    states = torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) + 5
    found = layer_entropy(states)
    for row in range(2):
        tokens = states[row].double().numpy()
        tokens = tokens - tokens.mean(0)
        tokens = np.array([token / np.linalg.norm(token) for token in tokens])
        values = np.linalg.svd(tokens, compute_uv=False) ** 2 / n
        expected = -sum(v * math.log(v) for v in values if v > 1e-10) / math.log(min(n, 12))
        assert abs(float(found[row]) - expected) < 1e-7
        assert 0 < expected < 1
    line = torch.linspace(-1, 1, n)[:, None] * torch.ones(12)
    assert layer_entropy(line[None]).abs().max() < 1e-6  # all on one line


def test_the_collapse_is_the_largest_drop_of_the_first_half():
    assert collapse([0.9, 0.85, 0.4, 0.35, 0.3, 0.3, 0.3]) == 1
    assert collapse([0.9, 0.85, 0.8, 0.79, 0.1, 0.1, 0.1]) == 0  # layer 3 of 6 falls more, but too late
    assert collapse([0.5, 0.6, 0.7, 0.7, 0.2]) == 0  # least rise; of equal ones the first
    assert collapse([0.5, 0.2]) == 0
    with pytest.raises(OptionError, match="curve"):
        collapse([0.5])


def test_the_curve_of_a_model():
    model, pixels = toy_vlm(), pictures(3)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 3)
    embeds = model.inputs_embeds(model.image_tokens(pixels), ids)
    with EntropyCurve(model.language, 1, 64) as probe:
        model.generate(model.image_tokens(pixels), ids, 4)  # steps of decoding are no prompts
        model.language.model(inputs_embeds=embeds[:1])
    weights = torch.tensor([2.0, 1.0, 1.0]).double() / 4  # the first picture was read twice
    states = model.language.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    expected = [float(layer_entropy(each[:, 1:65]) @ weights) for each in states[:4]]
    assert len(probe.curve) == 5
    np.testing.assert_allclose(probe.curve[:4], expected, atol=1e-5)
    drops = -np.diff(probe.curve)[:2]
    assert probe.layer == int(drops.argmax()) and probe.place == f"decoder:{probe.layer + 1}"
    before = list(probe.curve)
    model.language.model(inputs_embeds=embeds[1:])  # outside of the block
    assert probe.curve == before
    with EntropyPrune().attach(model, probe.place) as reduced:
        reduced(reduced.image_tokens(pixels), ids)
    with pytest.raises(OptionError, match="read in the block"):
        _ = EntropyCurve(model.language, 1, 64).curve


def rotated(states, positions, theta=10_000.0):
    """Turn (S, H, d) by hand: entry i and entry i + d/2 are a pair."""
    out, half = states.clone(), states.shape[-1] // 2
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-i / half)
            a, b = states[row, :, i], states[row, :, i + half]
            out[row, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[row, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("place", [1, 2, 3])
def test_what_is_looked_at_are_the_rotated_queries_of_the_layer_below(place):
    model, pixels = toy_vlm(), pictures(2)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 2)
    embeds = model.inputs_embeds(model.image_tokens(pixels), ids)
    states = model.language.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    below = decoder_layers(model.language)[place - 1]
    queries = below.self_attn.q_proj(below.input_layernorm(states[place - 1]))
    heads = model.language.config.num_attention_heads
    theta = model.language.config.rope_parameters["rope_theta"]
    expected = []
    for row in range(2):
        turned = rotated(queries[row].unflatten(-1, (heads, -1)), range(embeds.shape[1]), theta)[1:65]
        scores = [slow_score(each.numpy(), "none") for each in turned]
        expected.append(sorted(sorted(range(64), key=lambda j: -scores[j])[:20]))
    with EntropyPrune(keep=20, budget="kept").attach(model, f"decoder:{place}") as reduced:
        reduced(reduced.image_tokens(pixels), ids)
    assert reduced.numbers.tolist() == expected


def test_dropping_is_masking_and_the_cache_is_ragged():
    """A model whose layers from K on may not look at what is dropped says the same, also while it decodes."""
    lm, place, start, count, seen = tiny_lm(layers=4, heads=4, kv_heads=2).model, 2, 3, 20, 29
    ids = torch.randint(1, 97, (2, seen + 5), generator=torch.Generator().manual_seed(4))
    reducer = EntropyPrune(keep=13, budget="average")
    context = Context((1, count))
    with DecoderReduction(lm, reducer, f"decoder:{place}", start=start, count=count, context=context) as reduced:
        output = lm(ids[:, :seen], use_cache=True)
        logits, past = [output.logits[:, -6:]], output.past_key_values
        for step in range(seen, seen + 5):
            output = lm(ids[:, step : step + 1], past_key_values=past, position_ids=torch.full((2, 1), step))
            logits.append(output.logits)
    kept = reduced.map.index
    assert kept.shape == (2, (4 * 13 - 2 * 20) // 2) and (kept.diff() > 0).all()
    lengths = [layer.keys.shape[2] for layer in past.layers]
    assert lengths == [34, 34, 34 - count + 6, 34 - count + 6]
    open_to = torch.ones(2, seen + 5, dtype=torch.bool)
    open_to[:, start : start + count] = False
    open_to.scatter_(1, kept + start, True)
    mask = torch.ones(seen + 5, seen + 5).tril().bool() & open_to[:, None] | torch.eye(seen + 5).bool()
    edits = [
        edited_layer(lm, layer, lambda hidden, given: (hidden, {**given, "attention_mask": mask[:, None]}))
        for layer in range(place, 4)
    ]
    for edit in edits:
        edit.__enter__()
    expected = lm(ids).logits[:, seen - 6 :]
    for edit in edits:
        edit.__exit__(None, None, None)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


def plan(**options):
    reducer = EntropyPrune(keep=12, budget="kept", **options)
    x, context = toy_tokens(reducer)
    return x, context, reducer.reduce(x, context).index


def best(scores, largest=True):
    return [sorted(row) for row in scores.topk(12, largest=largest).indices.tolist()]


def test_controls_and_other_matrices():
    _, context, _ = plan()
    heads = context.queries[2][:, :, 1:].transpose(1, 2).double()  # (B, N, H, d)
    scores = torch.tensor([[slow_score(token.numpy(), "none") for token in row] for row in heads])
    assert plan()[2].tolist() == best(scores)
    assert plan(reverse=True)[2].tolist() == best(scores, largest=False)
    assert plan(score="norm")[2].tolist() == best(heads.square().sum((-1, -2)))
    assert plan(score="spread")[2].tolist() == best(heads.var(dim=2, correction=0).sum(-1))
    x, parts = toy_tokens(EntropyPrune())[0], context.queries[2].unflatten(-1, (4, 4)).transpose(2, 3).flatten(1, 2)
    cut = replace(context, queries={2: parts})  # 8 heads of 4
    heads = parts[:, :, 1:].transpose(1, 2)
    text = torch.tensor([[slow_score(token.numpy(), "trace") for token in row] for row in heads])
    found = EntropyPrune(keep=12, budget="kept", normalise="trace").reduce(x, cut).index
    assert found.tolist() == best(text) != EntropyPrune(keep=12, budget="kept").reduce(x, cut).index.tolist()
    _, context, found = plan(matrix="values")
    heads = context.values[2][:, :, 1:].transpose(1, 2)
    assert found.tolist() == best(head_entropy(heads)) and "queries" not in EntropyPrune(matrix="values").needs
    x, _, found = plan(matrix="hidden")
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    assert found.tolist() == best(head_entropy(normed.unflatten(-1, (2, 16))))


def test_too_few_heads_say_nothing():
    reducer = EntropyPrune(keep=12, budget="kept", matrix="keys")
    x, context = toy_tokens(reducer)
    with pytest.raises(OptionError, match="2 heads or more"):
        reducer.reduce(x, replace(context, keys={2: context.keys[2][:, :1]}))
    with pytest.raises(OptionError, match="3 heads or more"):
        EntropyPrune(keep=12, budget="kept", matrix="keys", normalise="trace").reduce(x, context)


OPTIONS = [
    {"matrix": "keys", "reverse": True}, {"matrix": "hidden"},
    {"score": "norm"}, {"score": "spread"}, {"budget": "kept", "matrix": "values"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_laws_hold_with_other_options(options):
    report = check("entropy-prune", **options)
    assert report.ok, str(report)
