"""Keyformer against its definition: explicit noise, explicit attention matrices, one query row at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from tokenary.core.errors import OptionError, UnknownNameError
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.memory.keyformer import BLOCK, Keyformer, KeyformerLayer, received
from tokenary.models.tiny import tiny_lm

# ------------------------------------------------------------------------------------------------ the slow reference


def zeta(noise, shape, seed, layer, *names):
    """The noise itself, float64."""
    stream = substream(seed, "keyformer", layer, *names)
    if noise == "gumbel":
        return -np.log(stream.standard_exponential(shape, dtype=np.float32).astype(float))
    if noise == "gaussian":
        return np.euler_gamma + math.pi / math.sqrt(6) * stream.standard_normal(shape, dtype=np.float32).astype(float)
    return np.full(shape, {"none": 0.0, "constant": np.euler_gamma}[noise])


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def reference(q, k, n, kept, window, interval, tau_init, tau_end, length, noise, seed, layer):
    """Positions that each key head holds after every reduction, and the scores at the end: lists of (Hkv, kept)."""
    q, k = q.double().numpy(), k.double().numpy()
    heads, total, size = q.shape
    group = heads // len(k)
    f = np.zeros((len(k), total))
    held = [list(range(n)) for _ in k]
    sets = []

    def reduce():
        for h, tokens in enumerate(held):
            newest = tokens[len(tokens) - window :]
            older = sorted(tokens[: len(tokens) - window], key=lambda i: -f[h, i])[: kept - window]
            held[h] = sorted(older + newest)
        sets.append([list(tokens) for tokens in held])

    for i in range(n):
        block = i // BLOCK
        drawn = zeta(noise, (heads, BLOCK, (block + 1) * BLOCK), seed, layer, "prompt", block)
        for head in range(heads):
            x = np.array([q[head, i] @ k[head // group, j] / math.sqrt(size) for j in range(i + 1)])
            f[head // group, : i + 1] += softmax((x + drawn[head, i - block * BLOCK, : i + 1]) / tau_init)
    if n > kept:
        reduce()
    for i in range(n, total):
        step = i - n + 1
        tau = tau_init + (tau_end - tau_init) * min(step / length, 1)
        for tokens in held:
            tokens.append(i)
        drawn = zeta(noise, (len(k), group, len(held[0])), seed, layer, "step", step)
        for head in range(heads):
            h = head // group
            x = np.array([q[head, i] @ k[h, j] / math.sqrt(size) for j in held[h]])
            f[h, held[h]] += softmax((x + drawn[h, head % group]) / tau)
        if len(held[0]) == kept + interval:
            reduce()
    return sets, np.stack([f[h, tokens] for h, tokens in enumerate(held)])


def random_qk(seed, total, heads=6, kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(heads, total, size, generator=generator)
    return q, torch.randn(kv_heads, total, size, generator=generator)


def fresh(policy, index=0, kv_heads=2) -> KeyformerLayer:
    state = policy.layer(index)
    state.index, state.n_layers, state.kv_heads, state.bytes_per_token = index, 8, kv_heads, 128
    return state


def drive(state, q, k, n, pieces=(), row=0, at_once=1):
    """Do what a cache does: show the prompt in pieces, then `at_once` tokens a pass; return the sets and the scores."""
    scale, group = q.shape[-1] ** -0.5, len(q) // len(k)
    edges = [0, *pieces, n]
    for start, stop in itertools.pairwise(edges):
        state.observe_prompt(row, q[:, start:stop], k[:, :stop], scale)
    positions = torch.arange(n).expand(len(k), -1)
    sets, done = [], n
    chosen = state.keep(row, n, n, True)
    while True:
        if chosen is not None:
            positions = chosen.apply(positions, dim=-1)
            sets.append(positions.tolist())
        if done == q.shape[1]:
            return sets, state._scores[row]
        count = min(at_once, state.room(row, positions.shape[1]), q.shape[1] - done)
        new = torch.arange(done, done + count).expand(len(k), -1)
        positions = torch.cat([positions, new], dim=1)
        keys = k.gather(1, positions[..., None].expand(-1, -1, k.shape[-1]))
        queries = q[:, done : done + count].view(len(k), group, count, -1)
        logits = torch.einsum("hgad,hnd->hgan", queries, keys) * scale
        later = positions[:, None, None, :] > new[:, None, :, None]
        state.observe(row, logits.masked_fill(later, float("-inf")))
        done += count
        chosen = state.keep(row, positions.shape[1], count, False)


@pytest.mark.parametrize(
    ("n", "keep", "recent", "interval", "taus", "noise"),
    [
        (40, 20, 0.3, 4, (1.0, 2.0), "gumbel"),
        (150, 33, 0.3, 16, (1.0, 4.0), "gumbel"),  # three blocks of noise, a group of ragged last rows
        (64, 10, 0.5, 1, (1.0, 1.0), "none"),
        (70, 69, 0.0, 7, (2.0, 0.5), "gaussian"),  # no window, temperature other than 1 in the prompt, and falling
        (90, 30, 0.3, 5, (1.5, 2.5), "constant"),
        (12, 30, 0.3, 5, (0.7, 1.2), "gumbel"),  # the budget is reached while generating
        (20, 6, 1.0, 3, (1.0, 2.0), "gumbel"),  # nothing but the window
        (9, 1, 0.3, 2, (1.0, 2.0), "gumbel"),
    ],
)
def test_sets_and_scores_are_those_of_the_reference(n, keep, recent, interval, taus, noise):
    total, seed, layer, length = n + 45, 11, 3, 20
    q, k = random_qk(n, total)
    expected, scores = reference(q, k, n, keep, int(recent * keep), interval, *taus, length, noise, seed, layer)
    policy = Keyformer(keep, recent, *taus, length, noise, interval=interval, seed=seed)
    sets, found = drive(fresh(policy, layer), q, k, n)
    assert len(expected) > 2
    assert sets == expected
    np.testing.assert_allclose(found.numpy(), scores, rtol=2e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_neither_pieces_nor_pass_nor_row_change_anything(data):
    n = data.draw(st.integers(2, 140), "n")
    pieces = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4), "pieces"))
    at_once = data.draw(st.integers(1, 9), "at_once")
    q, k = random_qk(n, n + 30)
    policy = Keyformer("40%", interval=5, seed=2)
    whole, scores = drive(fresh(policy, 1), q, k, n)
    cut, same = drive(fresh(policy, 1), q, k, n, pieces, row=3, at_once=at_once)
    assert cut == whole
    torch.testing.assert_close(same, scores, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the noise


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
def test_noise_has_the_moments_of_gumbel(noise):
    drawn = Keyformer(noise=noise).perturbation((4, 500, 500), 1.0, 0, "prompt", 0).log().double()
    n = drawn.numel()
    assert abs(drawn.mean() - np.euler_gamma) < 5 * 1.2825 / n**0.5
    assert abs(drawn.var() - math.pi**2 / 6) < 0.02
    skew = ((drawn - drawn.mean()) ** 3).mean() / drawn.std() ** 3
    assert abs(skew - (1.1395 if noise == "gumbel" else 0.0)) < 0.05


def test_noise_follows_the_gumbel_distribution():
    drawn = Keyformer().perturbation((100_000,), 1.0, 0, "step", 1).log().double().sort().values
    distribution = torch.exp(-torch.exp(-drawn))
    steps = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert (distribution - steps).abs().max() < 1.95 / len(drawn) ** 0.5  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("noise", ["gumbel", "gaussian", "constant", "none"])
def test_temperature_divides_the_noise(noise):
    policy = Keyformer(noise=noise)
    one, two = (policy.perturbation((3, 50), tau, 0, "step", 1).log() for tau in (1.0, 2.5))
    torch.testing.assert_close(two, one / 2.5, rtol=1e-4, atol=1e-5)
    assert bool((one == 0).all()) == (noise == "none")


def test_each_seed_layer_and_query_has_noise_of_its_own():
    names = [(0, 0, "step", 1), (1, 0, "step", 1), (0, 1, "step", 1), (0, 0, "step", 2), (0, 0, "prompt", 1)]
    drawn = [Keyformer(seed=seed).perturbation((64,), 1.0, *name) for seed, *name in names]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


def test_noise_is_finite_at_the_lowest_temperature_for_the_smallest_draw(monkeypatch):
    class Zero:
        def standard_exponential(self, shape, dtype):
            return np.zeros(shape, dtype)

    monkeypatch.setattr("tokenary.memory.keyformer.substream", lambda *names: Zero())
    noise = Keyformer(tau_init=0.25, tau_end=0.25).perturbation((1, 2, 1024), 0.25, 0, "prompt", 0)
    found = received(torch.zeros(1, 2, 1024), noise)
    torch.testing.assert_close(found, torch.full((1, 1024), 2 / 1024))


def test_noise_does_not_revive_what_is_masked():
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    logits[..., 20:] = float("-inf")
    noise = Keyformer().perturbation((2, 5, 30), 1.0, 0)
    noise[..., 20:] *= 1e6
    found = received(logits, noise)
    assert (found[:, 20:] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.full((2,), 5.0))


def test_constant_noise_is_no_noise_and_gumbel_is_some():
    q, k = random_qk(0, 130)
    none, constant, gumbel = (
        drive(fresh(Keyformer("30%", noise=noise)), q, k, 100)[0] for noise in ("none", "constant", "gumbel")
    )
    assert constant == none != gumbel


def test_temperature_rises_by_a_hundredth_a_token_and_stops():
    policy = Keyformer()
    assert [policy.temperature(step) for step in (0, 1, 50, 100, 500)] == pytest.approx([1, 1.01, 1.5, 2, 2])


# ------------------------------------------------------------------------------------------------- in a real network


def logits_of(model, prompt, new, policy):
    """Logits of a prompt's end and of each given token after it, (1 + len(new), V), and the target."""
    with attached(model):
        target = Target(model, None if policy is None else policy.attach(model.config, torch.float32))
        logits = [target.prefill([prompt])]
        for token in new:
            logits.append(target.score(TokenTree.roots([token]))[:, 0])
            target.commit([[0]])
    return torch.cat(logits), target


def test_scores_without_noise_are_the_attention_that_the_network_pays():
    model = tiny_lm(layers=2, heads=4, kv_heads=2).model
    ids = torch.randint(1, 97, (90,), generator=torch.Generator().manual_seed(4)).tolist()
    _, target = logits_of(model, ids[:70], ids[70:], Keyformer(1000, noise="none", tau_end=1.0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, weights in zip(target.cache.layers, attentions, strict=True):
        expected = weights[0].sum(1).view(2, 2, -1).sum(1)  # over queries, then over the heads of a group
        torch.testing.assert_close(layer.policy._scores[0], expected, rtol=1e-4, atol=1e-4)


def test_noise_leaves_outputs_alone_while_nothing_is_dropped():
    model = tiny_lm().model
    ids = torch.randint(1, 97, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    plain, _ = logits_of(model, ids[:40], ids[40:], None)
    quiet, _ = logits_of(model, ids[:40], ids[40:], Keyformer(1000, noise="none"))
    noisy, target = logits_of(model, ids[:40], ids[40:], Keyformer(1000))
    assert torch.equal(noisy, quiet)
    torch.testing.assert_close(noisy, plain, rtol=1e-4, atol=1e-4)
    assert len(target.cache.layers[0].policy._scores[0][0]) == 60


def test_the_first_step_after_the_prompt_sees_only_what_was_chosen():
    """Logits over a reduced cache are those of attention restricted, head by head, to the tokens kept."""
    model = tiny_lm(layers=1, heads=4, kv_heads=2).model
    ids = torch.randint(1, 97, (50,), generator=torch.Generator().manual_seed(5)).tolist()
    logits, target = logits_of(model, ids, [7], Keyformer("30%"))
    positions = target.cache.layers[0].positions[0, :, :16]  # 15 kept, 1 new
    seen = torch.zeros(2, 51).scatter_(1, positions.long(), 1).bool()
    assert seen.sum() == 32 and seen[:, 50].all()

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
        x = query @ keys.transpose(2, 3) * scaling
        allowed = torch.ones(51, 51, dtype=torch.bool).tril().repeat(4, 1, 1)
        allowed[:, -1] &= seen.repeat_interleave(2, 0)
        return (x.masked_fill(~allowed, float("-inf")).softmax(-1) @ values).transpose(1, 2), None

    AttentionInterface.register("keyformer_test", attend)
    model.set_attn_implementation("keyformer_test")
    with torch.no_grad():
        expected = model(torch.tensor([[*ids, 7]])).logits[0, -1]
    torch.testing.assert_close(logits[-1], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "options",
    [{"recent": 1.1}, {"tau_init": 0}, {"tau_end": float("nan")}, {"length": 0}, {"noise": "uniform"}, {"interval": 0}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(OptionError):
        Keyformer(**options)


def test_unknown_options_are_named():
    with pytest.raises(UnknownNameError, match="tau_init"):
        Keyformer(tau_ini=1.0)


def test_text_gives_the_same_options():
    policy = Keyformer(keep="25%", tau_end="3", length="64", noise="none")
    assert (policy.keep.ratio, policy.tau_end, policy.length, policy.noise) == (0.25, 3.0, 64, "none")
