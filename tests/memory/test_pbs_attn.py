"""PBS-Attn against its definition, one query and one block at a time, and what holds of it in a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.core.recipe import Recipe
from tokenary.core.token_map import check_token_map
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.keyformer import Keyformer
from tokenary.memory.law_tools import RAGGED, advance, oracle
from tokenary.memory.pbs_attn import PBSAttn
from tokenary.memory.pbs_attn.blocks import causal_pairs, importance, sorted_inside, top_mass
from tokenary.models.tiny import tiny_lm

SMALL = {"block": 4, "segment": 8, "queries": 4}

# ------------------------------------------------------------------------------------------------ the slow reference


def reference(q, k, v, scale, mass, block, segment, queries, how="mean", sink=True):
    """Output (H, Q, Dv), the order (H, N) and the blocks read, a dict (head, block of queries) -> set; in float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    heads, n_queries, _ = q.shape
    n = k.shape[1]
    before, group = n - n_queries, heads // len(k)
    whole = n // segment * segment
    pool = np.mean if how == "mean" else np.max
    output, orders, read = np.zeros((heads, n_queries, v.shape[-1])), [], {}
    for h in range(heads):
        keys, values = k[h // group], v[h // group]
        g = np.zeros(whole)
        judges = q[h, -queries:]
        for judge in judges if whole else ():
            x = keys[:whole] @ judge * scale
            g += np.exp(x - x.max()) / np.exp(x - x.max()).sum() / len(judges)
        pi = []
        for s in range(0, whole, segment):
            pi += sorted(range(s, s + segment), key=lambda j: -g[j])
        pi += range(whole, n)
        orders.append(pi)
        blocks = [pi[at : at + block] for at in range(0, n, block)]
        for i, at in enumerate(range(0, n_queries, block)):
            mine = range(at, min(at + block, n_queries))
            first, last = before + mine[0], before + mine[-1]
            mean = pool(q[h, list(mine)], axis=0)
            earlier = [j for j in range(len(blocks)) if j * block // segment < first // segment]
            chosen = {j for j in range(len(blocks)) if j not in earlier}
            x = {j: pool(keys[blocks[j]], axis=0) @ mean * scale for j in earlier}
            total, reached = sum(math.exp(value) for value in x.values()), 0.0
            for j in sorted(earlier, key=lambda j: -x[j]):
                if mass == 1 or reached < mass:
                    chosen.add(j)
                reached += math.exp(x[j]) / total
            if sink:
                chosen |= {j for j in range(len(blocks)) if 0 in blocks[j]}
            read[h, i] = {j for j in chosen if min(blocks[j]) <= last}
            for t in mine:
                seen = [s for j in read[h, i] for s in blocks[j] if s <= before + t]
                x = keys[seen] @ q[h, t] * scale
                weights = np.exp(x - x.max())
                output[h, t] = weights @ values[seen] / weights.sum()
    return output, np.array(orders), read


def case(seed, n_queries, n_keys, kv_heads=2, groups=2, size=8):
    generator = torch.Generator().manual_seed(seed)
    draw = [(kv_heads * groups, n_queries), (kv_heads, n_keys), (kv_heads, n_keys)]
    return [2 * torch.randn(*shape, size, generator=generator) for shape in draw]


def compare(q, k, v, **options):
    policy = PBSAttn(**options)
    state, scale = policy.layer(0), q.shape[-1] ** -0.5
    found = state.read(q, k, v, scale)
    order = policy.arrange(q, k, scale)
    blocks = policy.choose(q, k, order, scale)
    how, sink = policy.key_pool, policy.sink
    output, orders, read = reference(
        q, k, v, scale, policy.mass, policy.block, policy.segment, policy.queries, how, sink
    )
    assert order.index.tolist() == orders.tolist()
    for (h, i), chosen in read.items():
        assert set(blocks[h, i].nonzero()[:, 0].tolist()) == chosen
    np.testing.assert_allclose(found.numpy(), output, rtol=2e-4, atol=2e-4)
    assert state.computed == sum(map(len, read.values()))
    return policy, order, blocks


@pytest.mark.parametrize(("n_queries", "n_keys"), [(32, 32), (45, 45), (16, 64), (10, 39), (3, 9)])
@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_it_is_the_definition(n_queries, n_keys, mass):
    compare(*case(n_keys, n_queries, n_keys), mass=mass, **SMALL)


@pytest.mark.parametrize("options", [
    {"query_pool": "max", "key_pool": "max"}, {"sink": False}, {"queries": 100}, {"segment": 16}, {"block": 8},
], ids=str)  # fmt: skip
def test_its_options(options):
    compare(*case(1, 61, 61), mass=0.6, **{**SMALL, **options})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(0, 40), st.integers(1, 4), st.integers(1, 3),
       st.floats(0.05, 0.99))  # fmt: skip
def test_any_piece_of_any_prompt(seed, n_queries, before, block, blocks, mass):
    q, k, v = case(seed, n_queries, before + n_queries)
    compare(q, k, v, mass=mass, block=block, segment=block * blocks, queries=3)


def test_the_order_is_a_token_map_inside_segments():
    _, order, blocks = compare(*case(4, 50, 50), mass=0.5, **SMALL)
    assert not check_token_map(order)
    assert torch.equal(order.index // 8, torch.arange(50).expand(4, -1) // 8)
    assert order.index[:, 48:].tolist() == [[48, 49]] * 4
    assert not torch.equal(order.index[0], order.index[1])  # a permutation a head, in one group too
    assert (order.index == 0).nonzero()[:, 1].max() > 0  # key 0 moves, and its block is read all the same
    for head in range(4):
        assert blocks[head, :, int((order.index[head] == 0).nonzero()) // 4].all()


def test_important_keys_come_first_and_share_blocks():
    q, k, _ = case(0, 64, 64, kv_heads=1, groups=1)
    q, k = q * 0.1 + 1, k * 0.1
    k[0, [5, 11, 14, 22, 27, 29]] += 3
    policy = PBSAttn(mass=0.9, block=4, segment=16, queries=8)
    order = policy.arrange(q, k, 1.0)
    assert set(order.index[0, :3].tolist()) == {5, 11, 14} and set(order.index[0, 16:19].tolist()) == {22, 27, 29}
    read = policy.choose(q, k, order, 1.0).sum()
    plain = PBSAttn(mass=0.9, block=4, segment=16, queries=8, order="none")
    assert read < plain.choose(q, k, plain.arrange(q, k, 1.0), 1.0).sum()


def test_importance_has_no_mask():
    q, k, _ = case(3, 4, 12)
    expected = (q.view(2, 2, 4, 8) @ k[:, None].transpose(-1, -2) * 0.5).softmax(-1).mean(2).view(4, 12)
    torch.testing.assert_close(importance(q, k, 0.5), expected)


def test_mass_is_reached_by_the_fewest_and_the_one_that_reaches_it():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.0, 0.0, 0.0, 0.0]]).log()
    assert top_mass(scores, 0.49).tolist() == [[True, False, False, False], [False] * 4]
    assert top_mass(scores, 0.51)[0].tolist() == [True, True, False, False]
    assert top_mass(scores, 0.94)[0].tolist() == [True, True, True, False]
    assert top_mass(scores, 1.0).all()


def test_equal_scores_keep_their_order():
    assert sorted_inside(torch.zeros(2, 12), 4, 14).is_identity


def test_the_random_order_belongs_to_layer_and_place():
    q, k, _ = case(0, 40, 40)
    policy = PBSAttn(order="random", **SMALL)
    order = policy.arrange(q, k, 1.0, 1)
    assert torch.equal(policy.arrange(q[:, :3], k[:, :19], 1.0, 1).index[:, :16], order.index[:, :16])
    assert not torch.equal(policy.arrange(q, k, 1.0, 2).index, order.index)
    assert not torch.equal(PBSAttn(order="random", seed=1, **SMALL).arrange(q, k, 1.0, 1).index, order.index)
    assert torch.equal(order.index // 8, torch.arange(40).expand(4, -1) // 8)


def test_density_is_of_causal_pairs():
    assert causal_pairs(16, 16, 4) == 10 and causal_pairs(8, 16, 4) == 7 and causal_pairs(5, 14, 4) == 8
    q, k, v = case(0, 64, 64)
    state = PBSAttn(mass=1, order="none", **SMALL).layer(0)
    assert state.density == 1
    state.read(q, k, v, 1.0)
    assert state.density == 1  # all of it, and no pair that causality empties
    state.select_rows([])
    assert state.computed == 0
    state = PBSAttn(mass=0.1, **SMALL).layer(0)
    state.read(q, k, v, 1.0)
    assert 0 < state.density < 0.6


def test_segments_are_whole_blocks():
    with pytest.raises(OptionError, match="segment"):
        PBSAttn(block=64, segment=96)
    with pytest.raises(OptionError, match="mass"):
        PBSAttn(mass=0)


# ------------------------------------------------------------------------------------------------ in a model


def targets(lm, policy):
    return Target(lm.model, None, None if policy is None else policy.attach(lm.model.config))


def logits_of(lm, policy, prompts, chunk=1024):
    with attached(lm.model):
        return targets(lm, policy).prefill(prompts, chunk)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2"])
@pytest.mark.parametrize("chunk", [1024, 24])
def test_the_whole_mass_is_full_attention(family, chunk):
    lm = tiny_lm(family=family)
    expected = logits_of(lm, None, RAGGED)
    torch.testing.assert_close(logits_of(lm, PBSAttn(mass=1, **SMALL), RAGGED, chunk), expected, rtol=1e-5, atol=1e-5)


def test_it_does_change_something():
    lm = tiny_lm()
    assert (logits_of(lm, PBSAttn(mass=0.3, **SMALL), RAGGED) - logits_of(lm, None, RAGGED)).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1024, 24])
@pytest.mark.parametrize("order", ["importance", "random"])
def test_a_batch_is_its_sequences(order, chunk):
    lm, policy = tiny_lm(), PBSAttn(mass=0.4, order=order, **SMALL)
    batch = logits_of(lm, policy, RAGGED, chunk)
    for row, prompt in enumerate(RAGGED):
        torch.testing.assert_close(batch[row], logits_of(lm, policy, [prompt], chunk)[0], rtol=1e-4, atol=1e-4)


def test_left_padding_changes_nothing():
    lm, policy = tiny_lm(), PBSAttn(mass=0.4, **SMALL)
    longest = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    cache = TokenCache(lm.model.config, None, policy.attach(lm.model.config))
    with attached(lm.model), torch.inference_mode():
        found = lm.model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache
        ).logits[:, -1]
    torch.testing.assert_close(found, logits_of(lm, policy, RAGGED), rtol=1e-4, atol=1e-4)


def test_no_query_reads_a_later_token():
    q, k, v = case(2, 40, 40)
    policy = PBSAttn(mass=0.5, order="none", **SMALL)
    state = policy.layer(0)
    expected = state.read(q, k, v, 0.4)
    v[:, 22:] += 100  # values choose nothing
    found = state.read(q, k, v, 0.4)
    torch.testing.assert_close(found[:, :22], expected[:, :22])
    assert (found[:, 22:] - expected[:, 22:]).abs().amax((0, 2)).min() > 1e-3


def write(lm, policy, prompts, new, draft=None, keep=None):
    """Greedy tokens, and tokens a pass; trees are verified where `draft` makes them."""
    keeping = None if keep is None else keep.attach(lm.model.config, lm.dtype)
    target = Target(lm.model, keeping, None if policy is None else policy.attach(lm.model.config))
    passes = []
    with attached(lm.model):
        texts = [[*p, t] for p, t in zip(prompts, target.prefill(prompts).argmax(-1).tolist(), strict=True)]
        while min(len(t) - len(p) for t, p in zip(texts, prompts, strict=True)) < new:
            tree = TokenTree.roots([t[-1] for t in texts]) if draft is None else draft(texts)
            passes.append(max(map(len, advance(target, texts, tree))))
    return [t[len(p) :][:new] for t, p in zip(texts, prompts, strict=True)], passes


@pytest.mark.parametrize("keep", [None, Keyformer(keep="50%")], ids=["full", "keyformer"])
def test_drafts_change_nothing(keep):
    lm, policy, stream = tiny_lm(), PBSAttn(mass=0.4, **SMALL), np.random.default_rng(0)
    plain, _ = write(lm, policy, RAGGED, 40, keep=keep)
    truth = [[*p, *t] for p, t in zip(RAGGED, plain, strict=True)]
    drafted, passes = write(lm, policy, RAGGED, 32, lambda texts: oracle(texts, truth, stream), keep)
    assert drafted == [t[:32] for t in plain]
    assert max(passes) > 1


def test_decoding_reads_everything():
    lm = tiny_lm()
    with attached(lm.model):
        target = targets(lm, PBSAttn(mass=0.4, **SMALL))
        target.prefill(RAGGED)
        state = target.cache.token_layers[0].reader
        counted = state.computed
        assert 0 < state.density < 1
        target.score(TokenTree.chains([[1, 2, 3]] * 4))
        assert state.computed == counted


def test_generate_with_a_recipe():
    assert isinstance(Recipe.parse("pbs-attn:mass=0.8,block=64").build()["read"], PBSAttn)
